"""Programs: a model as a list of C++ operations that one call walks over, see cpp/program.h.

A program is recorded once, operation after operation, over float32 buffers [rows, columns] that are made
here, and run once for each step, without the GIL. What stands in a linear layer's prepared input is used
before the next is made, so all share two pieces of memory, one for each arithmetic. The price of recording:
sizes are fixed, and the longest step decides how much memory the buffers take, as far as it is really used.
"""

from array import array
from collections.abc import Iterable

import torch
from torch import Tensor

from fourfold.kernels.cpu import native
from fourfold.kernels.cpu.packed import PackedWeight

Memory = tuple[str, Tensor]
NO_INTEGERS = array("i")


class Program:
    """``rows`` tokens fit in a step, and those that are chosen go through the head.

    ``logits`` [rows, vocabulary] and ``tokens`` [1, rows], the places of their largest, hold a run's results
    until the next. Tensors that are handed over must stay as they are; they are kept alive.
    """

    def __init__(self, rows: int, vocabulary: int, widest_input: int):
        assert native is not None, "programs need the C++ extension"
        self.rows = rows
        self.native = native.Program(rows, rows, vocabulary)
        self.logits = torch.empty(rows, vocabulary)
        self.tokens = torch.zeros(1, rows, dtype=torch.int32)
        self._memory = {
            name: torch.empty(1, self.native.prepared_bytes(name, rows, widest_input), dtype=torch.uint8)
            for name in ("int8", "exact")
        }
        self._kept: list[object] = [self._memory]

    def __len__(self) -> int:
        return len(self.native)

    def buffer(self, columns: int) -> Tensor:
        """A new float32 matrix [rows, columns]."""
        return self.keep(torch.empty(self.rows, columns))

    def keep(self, tensor: Tensor) -> Tensor:
        """``tensor``, alive as long as the program."""
        self._kept.append(tensor)
        return tensor

    def embed(self, table: Tensor | PackedWeight, scale: float, out: Tensor) -> None:
        """Out = scale * the rows of ``table`` that the step's tokens name."""
        self._kept.append(table)
        self.native.embed(table, scale, out)

    def angles(self, speeds: Tensor, scale: float, out: Tensor) -> None:
        """Out [rows, 2 * speeds] = cosines, then sines, of position * speed; times ``scale``."""
        self.native.angles(speeds.tolist(), scale, out)

    def normed(self, x: Tensor, weight: Tensor, floor: float, inputs: Iterable[str], chosen: bool = False):
        """x * weight / sqrt(|x|^2 + floor), of all rows or the chosen, as linear layers' input."""
        memory = self.memory(inputs)
        self.native.rows(x, x.shape[1], norm=self.row(weight), floor=floor, prepared=memory, chosen=chosen)

    def gated(self, x: Tensor, gate: str, alpha: float, limit: float, inputs: Iterable[str]) -> None:
        """What ``gate`` (silu, gelu-tanh or clamped-swish) makes of x [rows, gate and up], as input."""
        memory = self.memory(inputs)
        self.native.rows(x, x.shape[1] // 2, gate=gate, alpha=alpha, limit=limit, prepared=memory)

    def add_normed(self, x: Tensor, weight: Tensor, floor: float, out: Tensor) -> None:
        """Out += x * weight / sqrt(|x|^2 + floor)."""
        self.native.rows(x, x.shape[1], norm=self.row(weight), floor=floor, out=out, accumulate=True)

    def prepared(self, x: Tensor, inputs: Iterable[str]) -> None:
        """``x`` as linear layers' input."""
        self.native.rows(x, x.shape[1], prepared=self.memory(inputs))

    def linear(
        self, w: PackedWeight, arithmetic: str, out: Tensor, column: int = 0, accumulate: bool = False
    ) -> None:
        """``out`` from ``column`` on = (or +=) what was prepared last times ``w`` transposed, plus bias."""
        self._kept.append(w)
        self.native.linear(w, (arithmetic, self._memory[arithmetic]), out, column, accumulate)

    def head(self, w: PackedWeight, arithmetic: str, cap: float) -> None:
        """``logits`` of the chosen rows, c tanh(logits / c) for a ``cap`` c above 0; and ``tokens``."""
        self._kept.append(w)
        self.native.logits(w, (arithmetic, self._memory[arithmetic]), self.logits, self.tokens, cap)

    def memory(self, inputs: Iterable[str]) -> list[Memory]:
        """Where the inputs of layers of these arithmetics are prepared."""
        return [(name, self._memory[name]) for name in sorted(set(inputs))]

    def run(
        self,
        tokens: array,
        spans: array,
        tables: bytes | array,
        chosen: array = NO_INTEGERS,
        first: int = 0,
        end: int | None = None,
    ) -> None:
        """Operations ``first`` to ``end`` - 1 for a step; all arguments are 32-bit integers.

        ``spans`` has three for each sequence: how many of ``tokens`` are its, where they stand, and how many
        blocks of ``tables`` are its. Raises ValueError for what does not fit.
        """
        self.native.run(first, len(self.native) if end is None else end, tokens, spans, tables, chosen)

    def row(self, vector: Tensor) -> Tensor:
        """``vector`` as a float32 matrix of one row, kept."""
        return self.keep(vector.float().contiguous()).view(1, -1)

"""Programs: a model as a list of C++ operations that one call walks over, see cpp/program.h.

A program is recorded once, operation after operation, over float32 buffers [rows, columns] that are made
here, and run once for each step, without the GIL. What stands in a linear layer's prepared input is used
before the next is made, so all share a piece of memory for each arithmetic, and all gated ones another. The
price of recording: sizes are fixed, and the longest step decides how much memory the buffers take, as far as
it is really used.
"""

from array import array
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fourfold.formats import get_format
from fourfold.kernels.cpu import native
from fourfold.kernels.cpu.packed import PackedWeight

LINE = 16  # values
Norm = tuple[Tensor, float]
"""Weight and floor: x * weight / sqrt(|x|^2 + floor); for an RMS norm, w * sqrt(n) and n * eps."""
NO_INTEGERS = array("i")


class InputScheme(NamedTuple):
    """What a checkpoint makes of a linear layer's input: x ``rotation`` (float32 [32, 32]) in blocks, then
    the nearest values of the MX format ``activation``.
    """

    rotation: Tensor | None = None
    activation: str | None = None

    def element(self) -> tuple[float, int, int, int, bool] | None:
        """The format's element as C++ takes it, and whether it fits int8."""
        if self.activation is None:
            return None
        e = get_format(self.activation).element
        return e.max, e.max_exponent, e.min_exponent, e.mantissa_bits, self.fits_int8

    @property
    def fits_int8(self) -> bool:
        """Whether the format's values are int8 codes under powers of two, which ``int8`` then takes as they
        are: of its parts the smallest is not below a 127th of the largest.
        """
        if self.activation is None:
            return False
        element = get_format(self.activation).element
        return element.max <= 127 * element.min

    def apply(self, x: Tensor) -> Tensor:
        """What ``x``, float32 [rows, n], becomes, n % 32 == 0."""
        assert native is not None
        out = torch.empty_like(x)
        native.Program.apply_scheme(x, self.rotation, self.element(), out)
        return out


AS_IT_IS = InputScheme()


class Buffer(NamedTuple):
    """Rows of float32, ``columns`` wide. Those of ``data`` may be wider: an odd number of cache lines, so
    that equal columns of many rows do not share the sets of a cache.
    """

    data: Tensor
    columns: int

    def first(self, rows: int) -> Tensor:
        """The first ``rows``, as they are: [rows, columns]."""
        return self.data[:rows, : self.columns]


class Gate(NamedTuple):
    """What an MLP makes of gate g and up u: silu(g) u, gelu(g) u by tanh (``gelu-tanh``), or, with g at most
    and u within +-``limit``, g sigmoid(``alpha`` g) (u + 1) (``clamped-swish``).
    """

    kind: str
    alpha: float
    limit: float


class Mixture(NamedTuple):
    """A mixture of experts: ``top_k`` of them for each row, by ``router`` float32 [experts, columns].

    ``gate_up`` [2 width, columns] and ``down`` [columns, width] of every expert are all of one kind.
    ``among_chosen``: shares are the softmax over the chosen, or else over all. ``schemes`` are of their
    inputs, the router's is as it is.
    """

    norm: Norm
    router: Tensor
    router_bias: Tensor | None
    gate_up: list[PackedWeight]
    down: list[PackedWeight]
    width: int
    top_k: int
    among_chosen: bool
    gate: Gate
    arithmetic: tuple[str, str]
    schemes: tuple[InputScheme, InputScheme] = (AS_IT_IS, AS_IT_IS)


class Program:
    """``rows`` tokens fit in a step, and of those that are chosen there are logits.

    ``logits`` [rows, vocabulary] and ``tokens`` [1, rows], the places of their largest, hold a run's results
    until the next. Tensors that are handed over must stay as they are; they are kept alive.
    """

    def __init__(self, rows: int, vocabulary: int, widest_input: int):
        assert native is not None, "programs need the C++ extension"
        self.rows = rows
        self.native = native.Program(rows, vocabulary)
        self._kept: list[object] = []
        self._mixtures: dict[tuple, tuple[dict[str, Buffer], Tensor]] = {}
        self.logits = self.buffer(vocabulary)
        self.tokens = torch.zeros(1, rows, dtype=torch.int32)
        sizes = {name: self.native.prepared_bytes(name, rows, widest_input) for name in ("int8", "exact")}
        self._memory, self._gated = (
            {name: torch.empty(1, size, dtype=torch.uint8) for name, size in sizes.items()} for _ in range(2)
        )
        self._input = self._memory  # what was prepared last

    def __len__(self) -> int:
        return len(self.native)

    def buffer(self, columns: int, close: bool = False, rows: int | None = None) -> Buffer:
        """A new buffer of as many rows as a step may have; ``close``: with nothing between them."""
        width = columns if close else (-(-columns // LINE) | 1) * LINE
        return Buffer(self.keep(torch.empty(rows or self.rows, width)), columns)

    def keep(self, tensor: Tensor) -> Tensor:
        """``tensor``, alive as long as the program."""
        self._kept.append(tensor)
        return tensor

    def row(self, vector: Tensor) -> Tensor:
        """``vector`` as a float32 matrix of one row, kept."""
        return self.keep(vector.float().contiguous()).view(1, -1)

    def embed(self, table: Tensor | PackedWeight, scale: float, out: Buffer) -> None:
        """Out = scale * the rows of ``table`` that the step's tokens name."""
        self._kept.append(table)
        self.native.embed(table, scale, out.data)

    def angles(self, speeds: Tensor, scale: float, out: Buffer) -> None:
        """Out [rows, 2 * speeds] = cosines, then sines, of position * speed; times ``scale``."""
        self.native.angles(speeds.tolist(), scale, out.data)

    def prepared(
        self,
        x: Buffer,
        inputs: Iterable[str],
        norm: Norm | None = None,
        scheme: InputScheme = AS_IT_IS,
    ) -> None:
        """``x``, perhaps normed, as the input of linear layers of arithmetics."""
        weight, floor = (None, 0.0) if norm is None else (self.row(norm[0]), norm[1])
        self._input = self._memory
        memory = [(name, self._memory[name]) for name in sorted(set(inputs))]
        made = self._scheme(scheme)
        self.native.rows(x.data, x.columns, norm=weight, floor=floor, prepared=memory, **made)

    def _scheme(self, scheme: InputScheme) -> dict[str, object]:
        self._kept.append(scheme.rotation)
        return {"rotation": scheme.rotation, "element": scheme.element()}

    def gated(self, x: Buffer, gate: Gate, out: Buffer) -> None:
        """Out = what ``gate`` makes of x [rows, gates, then ups]."""
        self.native.rows(x.data, out.columns, **gate._asdict(), out=out.data)

    def add_normed(self, x: Buffer, norm: Norm, out: Buffer) -> None:
        """Out += x, normed."""
        weight = self.row(norm[0])
        self.native.rows(x.data, x.columns, norm=weight, floor=norm[1], out=out.data, accumulate=True)

    def linear(
        self, w: PackedWeight, arithmetic: str, out: Buffer, column: int = 0, accumulate: bool = False
    ) -> None:
        """``out`` from ``column`` on = (or +=) what was prepared last times ``w`` transposed, plus bias."""
        self._kept.append(w)
        self.native.linear(w, (arithmetic, self._input[arithmetic]), out.data, column, accumulate)

    def gated_linear(self, w: PackedWeight, arithmetic: str, gate: Gate, out: Buffer) -> None:
        """``out`` = what ``gate`` makes of the two halves of what was prepared times ``w``, plus bias.

        Each half of ``w`` is whole tiles of 16 rows.
        """
        self._kept.append(w)
        self.native.gated(w, (arithmetic, self._input[arithmetic]), out.data, *gate)

    def gated_input(
        self, w: PackedWeight, arithmetic: str, gate: Gate, taken: str, scheme: InputScheme = AS_IT_IS
    ) -> None:
        """What ``gated_linear`` computes, prepared as the input of a linear layer of arithmetic ``taken``.

        Each half of ``w`` is whole blocks of 32 rows.
        """
        self._kept.append(w)
        source, target = (arithmetic, self._input[arithmetic]), (taken, self._gated[taken])
        self.native.gated(w, source, None, *gate, [target], **self._scheme(scheme))
        self._input = self._gated

    def mixture(self, x: Buffer, mixture: "Mixture", out: Buffer, accumulate: bool) -> None:
        """``out`` = (or +=) the shares of each row's experts, by a float32 router over the normed ``x``."""
        m, native, (first, second) = mixture, self.native, mixture.arithmetic
        slots, narrow = self._mixture_buffers(x.columns, m)
        normed, prepared = slots["normed"], (first, self._memory[first])
        norm, made = self.row(m.norm[0]), self._scheme(m.schemes[0])
        native.rows(
            x.data, x.columns, norm=norm, floor=m.norm[1], prepared=[prepared], out=normed.data, **made
        )
        bias = None if m.router_bias is None else self.row(m.router_bias)
        router = self.keep(m.router.float().contiguous())
        native.route(normed.data, x.columns, router, bias, m.top_k, m.among_chosen)
        gathered, again = (first, narrow), (second, narrow)
        native.gather(prepared, gathered, x.columns)
        native.experts(m.gate_up, gathered, slots["gated"].data, *m.gate)
        made = self._scheme(m.schemes[1])
        native.rows(slots["gated"].data, m.width, prepared=[again], each=m.top_k, **made)
        native.experts(m.down, again, slots["made"].data, "", 0.0, 0.0)
        native.combine(slots["made"].data, x.columns, out.data, accumulate)
        self._kept += [m.gate_up, m.down]

    def _mixture_buffers(self, columns: int, m: "Mixture") -> tuple[dict[str, Buffer], Tensor]:
        """Buffers that all layers of such mixtures share, and memory for slots' prepared rows."""
        key = (columns, m.width, m.top_k, m.arithmetic)
        if key not in self._mixtures:
            slots = self.rows * m.top_k
            widest = max(columns, m.width)
            memory = max(self.native.prepared_bytes(name, slots, widest) for name in m.arithmetic)
            buffers = {
                "normed": self.buffer(columns),
                "gated": self.buffer(m.width, rows=slots),
                "made": self.buffer(columns, rows=slots),
            }
            self._mixtures[key] = buffers, self.keep(torch.empty(1, memory, dtype=torch.uint8))
        return self._mixtures[key]

    def choose(self, *buffers: Buffer) -> None:
        """What follows is of the chosen rows alone: in ``buffers`` they come to stand first."""
        self.native.choose([(buffer.data, buffer.columns) for buffer in buffers])

    def head(self, w: PackedWeight, arithmetic: str, cap: float) -> None:
        """``logits``, c tanh(logits / c) for a ``cap`` c above 0; and ``tokens``."""
        self._kept.append(w)
        self.native.logits(w, (arithmetic, self._memory[arithmetic]), self.logits.data, self.tokens, cap)

    def run(
        self,
        tokens: array,
        spans: array,
        tables: bytes | array,
        chosen: array = NO_INTEGERS,
        first: int = 0,
        end: int | None = None,
    ) -> None:
        """Operations ``first`` to ``end`` - 1 for a step; all arguments are 32-bit integers, chosen in order.

        ``spans`` has three for each sequence: how many of ``tokens`` are its, where they stand, and how many
        blocks of ``tables`` are its. Raises ValueError for what does not fit.
        """
        self.native.run(first, len(self.native) if end is None else end, tokens, spans, tables, chosen)

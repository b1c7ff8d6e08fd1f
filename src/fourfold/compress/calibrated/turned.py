"""A weight seen as its columns, some at a time, in an order of whole blocks; and what they become."""

import torch

from fourfold.formats import BlockFormat, BlockTensor
from fourfold.formats.numbers.pack import pack


class Turned:
    """``weight`` [out, in], whose columns are taken and put back turned, [columns, out].

    ``order`` int64 [in] has the columns of a block (of ``size``) side by side. What is put replaces
    ``weight`` and fills the tensor of ``block_format`` that ``tensor`` gives in the end.
    """

    def __init__(self, weight: torch.Tensor, block_format: BlockFormat, order: torch.Tensor, size: int):
        self.weight, self._format, self._size = weight, block_format, size
        layout = block_format.empty_shapes(weight.shape).values()
        self.blocks, self.scales = (torch.empty(s, dtype=d, device=weight.device) for s, d in layout)
        self._starts = order[::size].tolist()
        self._natural = self._starts == sorted(self._starts)

    @property
    def width(self) -> int:
        """How many columns there are."""
        return self.weight.shape[-1]

    def starts(self, columns: slice) -> list[int]:
        """Where the blocks of ``columns`` begin in the weight."""
        return self._starts[columns.start // self._size : columns.stop // self._size]

    def take(self, columns: slice) -> torch.Tensor:
        """The columns at these places of the order, [b, out]."""
        # in two steps, each of which torch does by runs
        runs = [self.weight[:, run] for run in self._runs(columns)]
        return torch.cat(runs, -1).T.contiguous()

    def put(self, columns: slice, rounded: torch.Tensor, codes: torch.Tensor) -> None:
        """Values and codes (uint8) of ``columns``, [b, out] each."""
        values, packed = rounded.T.contiguous(), pack(codes.T.contiguous(), self._format.element.bits)
        begin = 0
        for run in self._runs(columns):
            end = begin + run.stop - run.start
            self.weight[:, run] = values[:, begin:end]
            self.blocks[:, self._bytes(run)] = packed[:, self._bytes(slice(begin, end))]
            begin = end

    def put_scales(self, column: int, held: torch.Tensor) -> None:
        """The scales [out, 1] of the block that begins at place ``column``, or [] of all."""
        if held.ndim:
            self.scales[:, self._starts[column // self._size] // self._size] = held[:, 0]
        else:
            self.scales.copy_(held)

    def tensor(self, rule: str | None, global_scale: torch.Tensor | None) -> BlockTensor:
        """What was put."""
        return BlockTensor(self._format.name, self.blocks, self.scales, rule, global_scale)

    def _runs(self, columns: slice) -> list[slice]:
        """Where ``columns`` lie in the weight."""
        if self._natural:
            return [columns]
        return [slice(start, start + self._size) for start in self.starts(columns)]

    def _bytes(self, columns: slice) -> slice:
        bits = self._format.element.bits
        return slice(columns.start * bits // 8, columns.stop * bits // 8)

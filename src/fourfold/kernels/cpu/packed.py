"""Linear layers whose weights are packed into tiles for the C++ kernels: see cpp/packed.h.

The tiles are made once, at load, and take the place of the checkpoint's bytes: 4.25 bits a value for MXFP4,
8.25 for MXINT8, 16 for bfloat16 (rows are filled up to sixteens). ``arithmetic`` is "int8" (inputs rounded to
int8 per block of 32: ``reference.round_to_int8_blocks``) or "exact" (inputs rounded to bfloat16); bfloat16
weights take only "exact".
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fourfold.core.errors import FourfoldError
from fourfold.formats import BlockTensor
from fourfold.kernels.cpu import cpu_features, native
from fourfold.kernels.cpu.memory import large_pages

TILE_ROWS = 16
KINDS = {"mxfp4": "mxfp4", "mxint8": "int8"}


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight [n, k]. ``data`` is uint8 [tiles, bytes of a tile], its start a multiple of 64 bytes; ``bias``
    is float32 [n] or None; ``kind`` is "mxfp4", "int8" or "bf16". ``input_parts``: as how many bfloat16s
    ``exactly`` takes a wider input, 2 for 16 of its bits, 3 for all 24.
    """

    kind: str
    n: int
    k: int
    data: torch.Tensor
    bias: torch.Tensor | None = None
    input_parts: int = 3

    @property
    def shape(self) -> torch.Size:
        """[n, k]."""
        return torch.Size((self.n, self.k))

    @classmethod
    def pack(cls, weight: BlockTensor | torch.Tensor, bias: torch.Tensor | None = None) -> "PackedWeight":
        """Packs [n, k]: a BlockTensor in mxfp4 or mxint8, or a tensor (kept as bfloat16).

        Raises FourfoldError for any other format or shape, and where there is no C++ extension.
        """
        packed = cls.pack_rows([weight])
        return packed if bias is None else replace(packed, bias=bias.detach().float().contiguous())

    @classmethod
    def pack_rows(cls, weights: Sequence[BlockTensor | torch.Tensor]) -> "PackedWeight":
        """Packs matrices [n_i, k] of one format as one [sum n_i, k]; each n_i but the last fills its tiles.

        Raises FourfoldError as ``pack`` does.
        """
        parts = [_parts(weight) for weight in weights]
        kind, n, k = parts[0][0], sum(weight.shape[0] for weight in weights), weights[0].shape[1]
        data, row = large_pages(*packed_shape(kind, n, k)), 0
        for weight, (own, codes, scales) in zip(weights, parts, strict=True):
            assert own == kind and weight.shape[1] == k and row % TILE_ROWS == 0
            own_tiles = data[row // TILE_ROWS : -(-(row + weight.shape[0]) // TILE_ROWS)]
            _extension().packed_pack(codes, scales, own_tiles, kind)
            row += weight.shape[0]
        return cls(kind, n, k, data)

    def linear(self, x: torch.Tensor, arithmetic: str = "int8", isa: str = "auto") -> torch.Tensor:
        """``x`` [..., k] times the weight transposed, plus the bias: [..., n] in the dtype of ``x``."""
        if x.shape[-1] != self.k:
            raise FourfoldError(f"A packed weight [{self.n}, {self.k}] got x {list(x.shape)}.")
        rows = x.detach().reshape(-1, self.k).float().contiguous()
        out = torch.empty(len(rows), self.n, dtype=torch.float32)
        bias = None if self.bias is None else self.bias[None]
        _extension().packed_linear(rows, self.data, self.kind, bias, out, arithmetic, isa)
        return out.to(x.dtype).view(*x.shape[:-1], self.n)

    def exactly(self, x: torch.Tensor) -> torch.Tensor:
        """As ``linear``, with ``x`` as it is: a float32 is the sum of ``input_parts`` bfloat16s.

        The price is a product for each, and parts below 2^-126 may count as zero.
        """
        if x.dtype == torch.bfloat16:
            return self.linear(x, "exact")
        return self.linear(torch.stack(bfloat16_parts(x, self.input_parts)), "exact").sum(0)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [n, k] as values."""
        return self.rows(torch.arange(self.n)).to(dtype)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Rows of the weight, [..., k] float32, for ``indices`` [...]: an embedding.

        Raises ValueError for an index beyond [0, n).
        """
        out = torch.empty(indices.numel(), self.k, dtype=torch.float32)
        wanted = indices.reshape(-1, 1).to(torch.int64).contiguous()
        _extension().packed_unpack(self.data, self.kind, self.n, wanted, out)
        return out.view(*indices.shape, self.k)


def bfloat16_parts(x: torch.Tensor, count: int = 3) -> list[torch.Tensor]:
    """Two or three bfloat16s, held as float32, that sum to the float32 ``x`` or, two, to 16 of its 24 bits.

    The first has what is not finite, and the last is yet to be rounded.
    """
    parts, rest = [], x
    for _ in range(count - 1):
        parts.append(
            (rest.view(torch.int32) & -65536).view(torch.float32)
        )  # rounded it could become infinite
        rest = (rest - parts[-1]).masked_fill_(~x.isfinite(), 0.0)
    return [*parts, rest]


def packed_shape(kind: str, n: int, k: int) -> tuple[int, int]:
    """The shape of ``PackedWeight.data``, uint8: tiles of 16 rows, and the bytes of each."""
    return _extension().packed_tiles(n), _extension().packed_tile_bytes(kind, k)


def layout_version() -> int:
    """Goes up whenever the bytes of ``PackedWeight.data`` change; 0 without the C++ extension."""
    return 0 if native is None else native.PACKED_LAYOUT


def checksum(data: torch.Tensor) -> str:
    """16 hexadecimal digits that say whether ``data`` (uint8, two dimensions) is what was written."""
    return f"{_extension().packed_checksum(data):016x}"


def packed_isas() -> list[str]:
    """Instruction sets that the packed kernels can use here, slowest first."""
    return [name for name, usable in cpu_features().items() if usable]


def _parts(weight: BlockTensor | torch.Tensor) -> tuple[str, torch.Tensor, torch.Tensor | None]:
    if len(weight.shape) != 2:
        raise FourfoldError(
            f"Only a matrix can be packed, not a tensor {list(weight.shape)}; index a stack first."
        )
    if not isinstance(weight, BlockTensor):
        return "bf16", weight.detach().bfloat16().contiguous(), None
    if weight.format not in KINDS:
        raise FourfoldError(f"Weights in {weight.format} cannot be packed; only {', '.join(KINDS)} can.")
    return KINDS[weight.format], weight.blocks.contiguous(), weight.scales.contiguous()


def _extension():
    if native is None:
        raise FourfoldError("Packed weights need the C++ extension, which cannot be loaded here.")
    return native

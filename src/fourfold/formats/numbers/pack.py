"""Codes to bytes and back. Little-endian: the first code lies in the lowest bits of the first byte.

Four bits: two codes a byte, even index in the low nibble. Six bits: four codes in three bytes. Eight: as is.
"""

import torch

from fourfold.core.errors import FourfoldError


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes [..., K * bits / 8] (uint8) of uint8 ``codes`` [..., K]. Raises FourfoldError for a ragged K."""
    if codes.shape[-1] * bits % 8 or (bits == 6 and codes.shape[-1] % 4):
        raise FourfoldError(f"A row of {codes.shape[-1]} codes of {bits} bits does not fill whole bytes.")
    if bits == 8:
        return codes
    if bits == 4:
        return codes[..., 0::2] | (codes[..., 1::2] << 4)
    a, b, c, d = codes.unflatten(-1, (-1, 4)).unbind(-1)
    return torch.stack([a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2)], -1).flatten(-2)


def unpack(blocks: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [..., K] (uint8) of packed ``blocks`` [..., K * bits / 8]."""
    if bits == 8:
        return blocks
    if bits == 4:
        return torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
    x, y, z = blocks.unflatten(-1, (-1, 3)).unbind(-1)
    codes = [x & 63, (x >> 6) | ((y & 15) << 2), (y >> 4) | ((z & 3) << 4), z >> 2]
    return torch.stack(codes, -1).flatten(-2)

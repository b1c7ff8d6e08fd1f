"""What the kernel tests share: weights from raw bytes, and products in double precision."""

import numpy as np
import torch

from fourfold.formats import BlockTensor

CODES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def random_weight(n: int, k: int, seed: int = 0) -> BlockTensor:
    """Every byte of codes is as likely as any other; scales around 2^-6."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8)
    scales = torch.randint(116, 127, (n, k // 32), generator=generator, dtype=torch.uint8)
    return BlockTensor("mxfp4", blocks, scales)


def random_x(m: int, k: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def values_of(w: BlockTensor) -> np.ndarray:
    """The weight in double precision, from the bytes and without the formats room."""
    blocks, scales = w.blocks.numpy(), w.scales.numpy().astype(np.float64)
    codes = np.stack([CODES[blocks & 15], CODES[blocks >> 4]], -1).reshape(len(blocks), -1)
    powers = np.where(scales == 255, np.nan, 2.0 ** (scales - 127))
    return codes * np.repeat(powers, 32, -1)


def assert_product(y: torch.Tensor, x: torch.Tensor, w: np.ndarray) -> None:
    """``y`` is ``x w^T`` up to the rounding of K float32 additions, and of the result to its dtype."""
    factor = x.double().numpy()
    exact, magnitude = factor @ w.T, np.abs(factor) @ np.abs(w).T
    allowed = magnitude * 2.0**-24 * (x.shape[-1] + 2)
    if y.dtype == torch.bfloat16:
        allowed += np.abs(exact) * 2.0**-8
    assert y.shape == exact.shape
    assert (np.abs(y.double().numpy() - exact) <= allowed).all()

"""Blocks that go wrong where something can: ties, edges of rules, subnormals, both ends of the range."""

import numpy as np
import pytest
import torch


def awkward_blocks(count: int, seed: int = 0) -> np.ndarray:
    """Finite float32 blocks [count, 32] over all of float32's range."""
    rng = np.random.default_rng(seed)
    blocks = rng.standard_normal((count, 32))
    ties = rng.integers(-64, 65, (count, 32)) / rng.choice([2, 4, 8, 16, 32], (count, 1))
    blocks = np.where(rng.random((count, 1)) < 0.5, ties, blocks)
    # the largest value at a point where some rule turns, or one float32 step beside it
    turn = rng.choice([1, 1.5, 1.75, 1.875, 1.9375, 1.96875, 1.984375, 1.9921875, 2], count).astype(
        np.float32
    )
    beside = np.nextafter(turn, rng.choice(np.array([0, 4], np.float32), count))
    turn = np.where(rng.random(count) < 0.5, turn, beside).astype(np.float64)
    chosen = rng.random(count) < 0.5
    blocks[chosen] /= np.maximum(np.abs(blocks[chosen]).max(-1, keepdims=True), 1e-9)
    blocks[chosen, 0] = turn[chosen]
    blocks *= rng.choice([1.0, 1.0, 2.0**-4], (count, 32))
    blocks[rng.random((count, 32)) < 0.02] = -0.0
    blocks[rng.random(count) < 0.01] = 0.0
    blocks = blocks * 2.0 ** rng.integers(-150, 122, (count, 1))
    return np.clip(blocks, -(2.0**125), 2.0**125).astype(np.float32)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Many small tensor operations wait for each other's threads on a busy machine; one thread does not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def many_blocks() -> np.ndarray:
    return awkward_blocks(100_000)

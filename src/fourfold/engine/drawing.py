"""One token from one row of logits: temperature, top-k, top-p, min-p, and a uniform number looked up.

Tokens weigh exp((logit - largest) / temperature), so the likeliest weighs 1. The number is looked up first in
the sums of blocks and then inside one: a running sum over the vocabulary would cost more than all the rest.
Top-p sorts no more than what can be among the kept: tokens above a floor, lowered until they weigh enough. A
row has 49152 weights in 60 us (2 ms where top-p is on and nearly all must be sorted).
"""

import math

import numpy as np
import torch

from fourfold.engine.requests import SamplingParams

BLOCK = 256
FLOOR, LOWEST_FLOOR = 1e-2, 1e-7


def draw(row: np.ndarray, params: SamplingParams, uniform: float) -> int:
    """The token of float32 logits ``row`` [V] that ``uniform``, from 0 to 1, stands for."""
    largest = row.max()
    if not math.isfinite(largest):  # a broken row has no distribution
        return int(row.argmax())
    weights = row - largest
    weights *= 1.0 / params.temperature
    np.exp(weights, out=weights)
    tokens = None
    if 0 < params.top_k < len(row):
        tokens = top_k(weights, params.top_k)
    if params.top_p < 1.0:
        tokens = top_p(weights, tokens, params.top_p)
    if params.min_p > 0.0:
        tokens = (
            np.flatnonzero(weights >= params.min_p)
            if tokens is None
            else tokens[weights[tokens] >= params.min_p]
        )
    return look_up(weights, uniform) if tokens is None else int(tokens[look_up(weights[tokens], uniform)])


def top_k(weights: np.ndarray, k: int) -> np.ndarray:
    """The k heaviest tokens, and those as heavy as the k-th."""
    return np.flatnonzero(weights >= torch.from_numpy(weights).topk(k, sorted=False).values.min().item())


def top_p(weights: np.ndarray, tokens: np.ndarray | None, p: float) -> np.ndarray:
    """The fewest heaviest of ``tokens`` (None: of all) that weigh at least the share p of them."""
    among = weights if tokens is None else weights[tokens]
    enough = p * float(among.sum())
    heavy, floor = np.flatnonzero(among >= FLOOR), FLOOR
    while floor and among[heavy].sum() < enough:
        floor = floor / 100 if floor > LOWEST_FLOOR else 0.0
        heavy = np.flatnonzero(among >= floor)
    heavy = heavy[np.argsort(-among[heavy], kind="stable")]
    before = among[heavy].cumsum(dtype=np.float64) - among[heavy]
    before[0] = -1.0  # the likeliest stays, however small p is
    heavy = np.sort(heavy[before < enough])
    return heavy if tokens is None else tokens[heavy]


def look_up(weights: np.ndarray, uniform: float) -> int:
    """The index at which the running sum of ``weights`` exceeds the share ``uniform`` of the whole."""
    sums = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK)).cumsum(dtype=np.float64)
    target = uniform * sums[-1]
    block = min(int(sums.searchsorted(target, "right")), len(sums) - 1)
    before = sums[block - 1] if block else 0.0
    inner = weights[block * BLOCK : (block + 1) * BLOCK].cumsum(dtype=np.float64)
    share = (target - before) / (sums[block] - before)
    return block * BLOCK + min(int(inner.searchsorted(share * inner[-1], "right")), len(inner) - 1)

"""One token from one row of logits: temperature, top-k, top-p, min-p, and a uniform number looked up.

Tokens weigh exp((logit - largest) / temperature), so the likeliest weighs 1. The number is looked up first in
the sums of blocks and then inside one: a running sum over the vocabulary would cost more than all the rest.
Top-p sorts no more than what can be among the kept: tokens above a floor, lowered until they weigh enough.

``draw`` and ``logprobs`` say what is computed. Where the C++ extension is, it does (cpp/drawing.h), for all
rows of a step together: 49152 weights in 15 us on one thread, where numpy takes 60.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from fourfold.kernels.cpu import native

BLOCK = 256
FLOOR, LOWEST_FLOOR = 1e-2, 1e-7
Logprobs = tuple[float, list[tuple[int, float]]]


class Draw(NamedTuple):
    """A token to be drawn from a ``row`` with argmax ``likeliest`` by ``uniform``, from 0 to below 1."""

    row: int
    likeliest: int
    uniform: float
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


class Asked(NamedTuple):
    """Logprobs of a ``row``: the one of ``token``, and those of the ``most`` likeliest."""

    row: int
    token: int
    most: int


def draw_all(rows: np.ndarray, draws: list[Draw]) -> list[int]:
    """The tokens of ``draws`` from float32 logits ``rows`` [.., V], each from its own row alone."""
    if native is None:
        return [draw(rows[one.row], one) for one in draws]
    return native.draw(rows, draws)


def logprobs_all(rows: np.ndarray, asked: list[Asked]) -> list[Logprobs]:
    """Log-probabilities in float32 logits ``rows`` [.., V]; likeliest tokens come first."""
    if native is None or not asked:
        return [logprobs(rows[one.row], one) for one in asked]
    return native.logprobs(rows, asked)


def draw(row: np.ndarray, how: Draw) -> int:
    """The token of float32 logits ``row`` [V]."""
    largest = row[how.likeliest]
    if not math.isfinite(largest):  # a broken row has no distribution
        return how.likeliest
    weights = row - largest
    weights *= 1.0 / how.temperature
    np.exp(weights, out=weights)
    tokens = None
    if 0 < how.top_k < len(row):
        tokens = top_k(weights, how.top_k)
    if how.top_p < 1.0:
        tokens = top_p(weights, tokens, how.top_p)
    if how.min_p > 0.0:
        tokens = (
            np.flatnonzero(weights >= how.min_p) if tokens is None else tokens[weights[tokens] >= how.min_p]
        )
    if tokens is None:
        return look_up(weights, how.uniform)
    return int(tokens[look_up(weights[tokens], how.uniform)])


def logprobs(row: np.ndarray, asked: Asked) -> Logprobs:
    """Log-probabilities in float32 logits ``row`` [V]; none but NaN where there is no distribution."""
    if not math.isfinite(row.max()):
        return math.nan, []
    raw = torch.from_numpy(row).log_softmax(-1)
    values, indices = raw.topk(min(asked.most, len(row)))
    return raw[asked.token].item(), list(zip(indices.tolist(), values.tolist(), strict=True))


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

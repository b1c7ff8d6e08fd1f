"""Which format for which group: an integer programme, and the frontier of its solutions.

Minimise the summed cost over groups subject to the summed size, with one format a group; or the size subject
to the cost (scipy's milp, HiGHS). A group is what serving kernels fuse, so that its members share a format.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from fourfold.core.errors import FourfoldError, UsageError

RELATIVE_GAP = 1e-4  # far below the noise of the costs


@dataclass(frozen=True)
class Group:
    """Modules that share a format: for each candidate, the smallest first, its size in bytes and its
    predicted KL.
    """

    modules: tuple[str, ...]
    numel: int
    nbytes: dict[str, int]
    cost: dict[str, float]


@dataclass(frozen=True)
class Choice:
    """One solution: the format of each group (in the order given), the bytes and the predicted KL of all."""

    formats: tuple[str, ...]
    nbytes: int
    cost: float


def within_bytes(groups: list[Group], nbytes: float) -> Choice:
    """The least predicted KL in ``nbytes``. Raises UsageError when even the smallest formats need more."""
    smallest = sum(min(g.nbytes.values()) for g in groups)
    if nbytes < smallest:
        raise UsageError(
            f"The budget leaves {nbytes:.0f} bytes for the weights that are rounded, and they need at least "
            f"{smallest} ({8 * smallest / numel(groups):.3f} bits a weight). Raise the budget."
        )
    return _solve(groups, least=_costs(groups), most=_sizes(groups), limit=nbytes)


def within_cost(groups: list[Group], cost: float) -> Choice:
    """The fewest bytes at a predicted KL of at most ``cost``. Raises UsageError when nothing is that good."""
    best = sum(min(g.cost.values()) for g in groups)
    if cost < best:
        raise UsageError(f"No choice of formats has a predicted KL of {cost:g}; the least is {best:g}.")
    return _solve(groups, least=_sizes(groups), most=_costs(groups), limit=cost)


def frontier(groups: list[Group], points: int = 17) -> list[Choice]:
    """Solutions from the smallest size to the largest, each larger than the last and of less predicted KL.

    Sizes tried are denser where they are small, because that is where each byte buys most.
    """
    low = sum(min(g.nbytes.values()) for g in groups)
    high = sum(max(g.nbytes.values()) for g in groups)
    tried = [within_bytes(groups, low * (high / low) ** (i / (points - 1))) for i in range(points)]
    return undominated(tried)


def undominated(choices: list[Choice]) -> list[Choice]:
    """``choices`` by size, without those for which another is no larger and no worse."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.nbytes, c.cost)):
        if not kept or choice.cost < kept[-1].cost:
            kept.append(choice)
    return kept


def numel(groups: list[Group]) -> int:
    """Weights in all groups."""
    return sum(g.numel for g in groups)


def _sizes(groups: list[Group]) -> np.ndarray:
    return np.array([float(v) for g in groups for v in g.nbytes.values()])


def _costs(groups: list[Group]) -> np.ndarray:
    return np.array([g.cost[f] for g in groups for f in g.nbytes])


def _solve(groups: list[Group], least: np.ndarray, most: np.ndarray, limit: float) -> Choice:
    owner = np.repeat(np.arange(len(groups)), [len(g.nbytes) for g in groups])
    one_each = csr_matrix((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    # HiGHS compares with absolute tolerances, so both sides are brought to the size of one
    unit, scale = least.max() or 1.0, limit or most.max() or 1.0
    with _silent():
        solution = milp(
            least / unit,
            integrality=np.ones(len(owner)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(most[None] / scale, ub=limit / scale),
            ],
            options={"mip_rel_gap": RELATIVE_GAP, "time_limit": 60},
        )
    if solution.x is None:
        raise FourfoldError(f"No mixture of formats was found within the budget ({solution.message}).")
    taken = np.flatnonzero(solution.x > 0.5)
    names = [form for g in groups for form in g.nbytes]
    formats = tuple(names[i] for i in taken)
    return Choice(
        formats,
        sum(g.nbytes[f] for g, f in zip(groups, formats, strict=True)),
        sum(g.cost[f] for g, f in zip(groups, formats, strict=True)),
    )


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing that C code prints is seen: HiGHS has a line of debugging that no option stops
    (https://github.com/jump-dev/HiGHS.jl/issues/312).
    """
    c = ctypes.CDLL(None)
    sys.stdout.flush()
    c.fflush(None)
    kept = os.dup(1)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        c.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)

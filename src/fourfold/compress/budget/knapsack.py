"""One of each group so that a sum is least and another stays within a limit: the multiple-choice knapsack.

For any price p >= 0 of what is limited, every group may choose by itself, and

    bound(p) = sum over groups of min(value + p * weight)  -  p * limit

is at most the least sum (Lagrange); the best p is found by halving an interval. What an item's ``value + p *
weight`` exceeds its group's least by, its choice adds to the bound; choices whose excesses together pass the
distance from the bound to a solution that is already known can be no better. So few items of few groups stay
in question. Partial choices then grow group by group, of two the lighter unless the other is better: exact,
and of 900 groups some hundred partial choices at once (Pisinger, EJOR 83, 1995).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

HALVINGS = 100
HIGHEST_PRICE = 1e100  # where every group takes its lightest
MOST_PARTIAL = 200_000  # beyond it those with the least excess stay, and the solution may miss the least sum


class Partial(NamedTuple):
    """Partial choices, equally many groups in each: sums over what is chosen, by weight."""

    weights: np.ndarray
    values: np.ndarray
    excess: np.ndarray


@dataclass(frozen=True)
class Knapsack:
    """Items of ``values`` and ``weights`` >= 0, [groups, items] each; infinite values fill short rows.

    ``limit`` leaves room for the lightest item of every group.
    """

    values: np.ndarray
    weights: np.ndarray
    limit: float

    def solve(self) -> np.ndarray:
        """The item of each group [groups]; of equals the lighter."""
        order = np.lexsort((self.values, self.weights), axis=-1)
        rows = np.arange(len(order))[:, None]
        return order[
            rows[:, 0], Knapsack(self.values[rows, order], self.weights[rows, order], self.limit)._solve()
        ]

    def _solve(self) -> np.ndarray:
        """The same of items in the order of their weights."""
        price = self._price()
        charged = self.values + price * self.weights
        least = charged.min(1)
        known = self._fill(self._chosen(price))
        room = self._sum(self.values, known) - (least.sum() - price * self.limit)
        found = self._search(charged - least[:, None], room)
        better = found is not None and self._sum(self.values, found) < self._sum(self.values, known)
        return found if better and found is not None else known

    def _chosen(self, price: float) -> np.ndarray:
        """What each group takes by itself."""
        return (self.values + price * self.weights).argmin(1)

    def _sum(self, of: np.ndarray, chosen: np.ndarray) -> float:
        return float(of[np.arange(len(of)), chosen].sum())

    def _price(self) -> float:
        """The smallest price at which what the groups take is within the limit."""
        low, high = 0.0, 1.0
        if self._fits(low):
            return low
        while not self._fits(high) and high < HIGHEST_PRICE:
            low, high = high, 2 * high
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if self._fits(middle) else (middle, high)
        return high

    def _fits(self, price: float) -> bool:
        return self._sum(self.weights, self._chosen(price)) <= self.limit

    def _fill(self, chosen: np.ndarray) -> np.ndarray:
        """``chosen`` with what still fits, what saves most for its weight first."""
        chosen, groups = chosen.copy(), np.arange(len(chosen))
        left = self.limit - self._sum(self.weights, chosen)
        saves = self.values[groups, chosen][:, None] - self.values
        adds = self.weights - self.weights[groups, chosen][:, None]
        useful = np.argwhere((saves > 0) & (adds <= left))
        gain = saves[tuple(useful.T)] / np.maximum(adds[tuple(useful.T)], np.finfo(float).tiny)
        for group, item in useful[np.argsort(-gain, kind="stable")]:
            added = self.weights[group, item] - self.weights[group, chosen[group]]
            if self.values[group, item] < self.values[group, chosen[group]] and added <= left:
                chosen[group], left = item, left - added
        return chosen

    def _search(self, excess: np.ndarray, room: float) -> np.ndarray | None:
        """The best choice within the limit whose ``excess`` is at most ``room`` in all, if there is one."""
        partial = Partial(np.zeros(1), np.zeros(1), np.zeros(1))
        steps: list[tuple[np.ndarray, np.ndarray]] = []
        order = np.argsort((excess <= room).sum(1), kind="stable")
        for group in order:
            items = np.flatnonzero(excess[group] <= room)
            partial, step = self._grow(partial, group, items, excess, room)
            steps.append(step)
        if not (partial.weights <= self.limit).any():
            return None
        at = int(np.where(partial.weights <= self.limit, partial.values, np.inf).argmin())
        chosen = np.empty(len(excess), dtype=np.int64)
        for group, (before, item) in zip(order[::-1], reversed(steps), strict=True):
            chosen[group], at = item[at], before[at]
        return chosen

    def _grow(
        self, partial: Partial, group: int, items: np.ndarray, excess: np.ndarray, room: float
    ) -> tuple[Partial, tuple[np.ndarray, np.ndarray]]:
        """Every partial choice with each of ``items``; of those that stay, where from and with which item."""
        added = (self.weights, self.values, excess)
        weights, values, over = (
            (sums[:, None] + of[group, items]).ravel() for sums, of in zip(partial, added, strict=True)
        )
        by_weight = np.lexsort((values, weights))
        by_weight = by_weight[over[by_weight] <= room]
        lightest = np.minimum.accumulate(np.append(np.inf, values[by_weight]))[:-1]
        kept = by_weight[values[by_weight] < lightest]
        if len(kept) > MOST_PARTIAL:
            kept = kept[np.sort(np.argpartition(over[kept], MOST_PARTIAL)[:MOST_PARTIAL])]
        before, item = np.divmod(kept, len(items))
        return Partial(weights[kept], values[kept], over[kept]), (before, items[item])

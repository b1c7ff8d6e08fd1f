"""Tensors of a model in order, computed ahead on a few threads within a bound on memory.

Each thread makes whole tensors with one torch thread: reading, rounding and writing then overlap, and nothing
waits at the end of every small operation as it would with all threads inside one operation. Work is admitted
while the checkpoint tensors it is made from fit in ``BUDGET_BYTES`` together, or while it is the only one; so
memory is that of the largest tensor plus a constant.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from fourfold.compress.model import Model, Value

BUDGET_BYTES = 96 * 2**20
AHEAD = 2  # tensors in work or ready, per thread


def stream(model: Model, names: Iterable[str], threads: int | None = None) -> Iterator[tuple[str, Value]]:
    """``(name, tensor)`` in the order of ``names``. An error in making one is raised when its turn comes."""
    threads = threads or torch.get_num_threads()
    waiting: deque[tuple[str, Future[Value]]] = deque()
    # OpenMP keeps its thread count per thread, so this leaves the caller's as it is
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for name in names:
                while waiting and not fits(model, [n for n, _ in waiting], name, threads):
                    yield _next(waiting)
                waiting.append((name, pool.submit(model.__getitem__, name)))
            while waiting:
                yield _next(waiting)
        finally:
            for _, future in waiting:
                future.cancel()


def fits(model: Model, waiting: list[str], name: str, threads: int) -> bool:
    """Whether ``name`` may be worked on beside ``waiting``."""
    if len(waiting) >= AHEAD * threads:
        return False
    sources: dict[str, int] = {}
    for entry in (model.entries[n] for n in [*waiting, name]):
        # packed tensors that an import expands count with what they become
        size = max(entry.source.nbytes, entry.info.nbytes)
        sources[entry.source.name] = max(size, sources.get(entry.source.name, 0))
    return len(sources) == 1 or sum(sources.values()) <= BUDGET_BYTES


def _next(waiting: deque[tuple[str, Future[Value]]]) -> tuple[str, Value]:
    name, future = waiting.popleft()
    return name, future.result()

"""The driver: runs the original model layer by layer, and hands every layer's states to whoever is free.

A worker that dies is replaced and its layer made again; a layer that takes three workers with it stops the
run. Finished layers are durable as ever, so ``--resume`` goes on from there. States wait on disk, those of at
most two layers a worker: tokens x hidden size x 2 bytes each.
"""

import os
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fourfold.cluster.worker import LayerWorker, save_states, states_key
from fourfold.compress import Recipe
from fourfold.compress.calibrated.loop import LayerLoop, LayerProgress, key_of
from fourfold.compress.calibrated.run import Spread
from fourfold.compress.pipeline import is_calibrated
from fourfold.core.errors import FourfoldError, UsageError

DEATHS = 3
AHEAD = 2  # layers in work or waiting, per worker


def check_workers(recipe: Recipe) -> None:
    """Raise UsageError for a recipe whose layers cannot be shared, FourfoldError where Ray is missing."""
    if not is_calibrated(recipe):
        raise UsageError(
            f"The recipe '{recipe.name}' looks at no activations and needs no workers. Leave out --workers."
        )
    if recipe.inputs != "original":
        raise UsageError(
            f"In the recipe '{recipe.name}' each layer sees what the quantized layers before it give, so "
            "layers cannot be made at the same time. Add `inputs: original` to it, or leave out --workers."
        )
    _ray()


def spread_over(workers: int, source: str, recipe: Recipe, device: str) -> Spread:
    """What ``quantize`` takes to have its layers made by ``workers`` Ray actors, each with a GPU for cuda.

    It joins the cluster that RAY_ADDRESS names, or starts one on this machine.
    """
    check_workers(recipe)

    def spread(loop: LayerLoop, progress: LayerProgress | None) -> None:
        count = len(loop.skeleton)
        todo = [index for index in range(count) if loop.store.find(key_of(index)) is None]
        if not todo:
            return
        with ray_cluster(workers, device):
            team = Team(workers, source, loop, device, progress, count - len(todo))
            for index, states in loop.original_states(todo[-1]):
                if index in todo:
                    team.wait_until_fewer_than(AHEAD * workers)
                    save_states(loop.store, index, states)
                    team.give(index)
            team.wait_until_fewer_than(1)

    return spread


class Team:
    """Workers, and which layers they are at. They are hired when the first layer is given."""

    def __init__(
        self,
        size: int,
        source: str,
        loop: LayerLoop,
        device: str,
        progress: LayerProgress | None,
        done: int = 0,
    ):
        self.size, self.source, self.loop, self.device, self.progress = size, source, loop, device, progress
        self._tokens: Any = None
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, int]] = {}
        self._waiting: deque[int] = deque()
        self._deaths: Counter[int] = Counter()
        self._done = done
        self._tell(0)

    def give(self, index: int) -> None:
        """Have layer ``index`` made, whose states are on disk."""
        if self._tokens is None:  # only now is there on disk what passes learned over the whole model
            self._tokens = _ray().put(self.loop.calibration)
            self._idle = [self._hire() for _ in range(self.size)]
        self._waiting.append(index)
        self._assign()

    def wait_until_fewer_than(self, layers: int) -> None:
        """Until fewer are in work or waiting. Raises FourfoldError for a layer that cannot be made."""
        while len(self._busy) + len(self._waiting) >= layers:
            self._collect()

    def _assign(self) -> None:
        while self._idle and self._waiting:
            worker, index = self._idle.pop(), self._waiting.popleft()
            self._busy[worker.make.remote(index)] = (worker, index)

    def _collect(self) -> None:
        ray = _ray()
        [ready], _ = ray.wait(list(self._busy), num_returns=1)
        worker, index = self._busy.pop(ready)
        try:
            problem = ray.get(ready)
        except ray.exceptions.RayActorError as error:
            self._replace(index, error)
        else:
            if problem is not None:
                raise FourfoldError(problem)
            self._idle.append(worker)
            self._finished(index)
        self._assign()

    def _finished(self, index: int) -> None:
        self.loop.store.discard(states_key(index))
        self._done += 1
        self._tell(index)

    def _tell(self, index: int) -> None:
        if self.progress is not None:
            self.progress(self._done, len(self.loop.skeleton), self.loop.skeleton.prefix(index))

    def _replace(self, index: int, error: Exception) -> None:
        self._deaths[index] += 1
        if self._deaths[index] >= DEATHS:
            raise FourfoldError(
                f"{self.loop.skeleton.prefix(index)} has ended {DEATHS} workers ("
                f"{' '.join(str(error).split())[:300]}). Finished layers are kept: look at memory and at the "
                "paths on the workers' machines, then run the same command with --resume."
            ) from error
        self._waiting.appendleft(index)
        self._idle.append(self._hire())

    def _hire(self) -> Any:
        on_gpu = self.device.startswith("cuda")
        actor = _ray().remote(num_cpus=1, num_gpus=1 if on_gpu else 0)(LayerWorker)
        work = self.loop.store.folder.parent.absolute()
        recipe = self.loop.recipe.model_dump()
        return actor.remote(self.source, recipe, self._tokens, work, "cuda" if on_gpu else "cpu")


@contextmanager
def ray_cluster(workers: int, device: str) -> Iterator[None]:
    """Ray, joined or started, with room for ``workers``. Raises UsageError where there is too little."""
    ray = _ray()
    address = os.environ.get("RAY_ADDRESS")
    started = not ray.is_initialized()
    if started:
        local = {} if address else {"num_cpus": workers, "include_dashboard": False}
        ray.init(address=address, log_to_driver=False, configure_logging=False, **local)
    try:
        kind = "GPU" if device.startswith("cuda") else "CPU"
        there = int(ray.cluster_resources().get(kind, 0))
        if there < workers:
            raise UsageError(
                f"--workers {workers}: Ray has {there} {kind}s. Ask for fewer, or let more machines join."
            )
        yield
    finally:
        if started:
            ray.shutdown()


def _ray() -> Any:
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise FourfoldError(
            "Workers are Ray actors, and ray is not installed: pip install 'fourfold[cluster]', or leave out "
            "--workers."
        ) from None
    return ray

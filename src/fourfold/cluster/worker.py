"""A worker: makes the layers it is given, one at a time, into the folder that all share."""

from pathlib import Path
from typing import Any

import torch

from fourfold.compress.calibrated.loop import LayerLoop
from fourfold.compress.calibrated.store import LayerStore
from fourfold.compress.calibration import CalibrationSet
from fourfold.compress.pipeline import prepare
from fourfold.compress.recipe import Recipe
from fourfold.compress.resolve import open_source, resolve
from fourfold.core.errors import FourfoldError


class LayerWorker:
    """Opens ``source`` for itself; ``work`` is the run's ``OUT.partial``, and both paths hold on its machine.

    On a CPU it computes with one thread, so that a layer's bytes do not depend on who made it.
    """

    def __init__(self, source: str, recipe: dict[str, Any], tokens: CalibrationSet, work: Path, device: str):
        torch.set_num_threads(1)
        chosen = Recipe.model_validate(recipe)
        model = prepare(chosen, resolve(open_source(source), chosen).model)
        self.loop = LayerLoop(model, chosen, tokens, LayerStore(work), torch.device(device))
        self.loop.learn()

    def make(self, index: int) -> str | None:
        """Finish layer ``index``. Returns None, or what stopped it in words."""
        try:
            self.loop.make(index, load_states(self.loop.store, index, self.loop.skeleton.device))
        except FourfoldError as error:
            return str(error)
        return None


def states_key(index: int) -> str:
    """The name of the files that hold what reaches layer ``index``."""
    return f"states-{index:05d}"


def save_states(store: LayerStore, index: int, states: list[torch.Tensor]) -> None:
    """Leave ``states`` for whoever makes layer ``index``."""
    store.save(states_key(index), {f"{n:05d}": hidden.cpu() for n, hidden in enumerate(states)}, [])


def load_states(store: LayerStore, index: int, device: torch.device) -> list[torch.Tensor]:
    """What ``save_states`` left. Raises FourfoldError when this machine does not see it."""
    found = store.find(states_key(index))
    if found is None:
        raise FourfoldError(
            f"A worker does not find {states_key(index)} in {store.folder}. The output's folder must be one "
            "that all machines share."
        )
    values = store.load_all(states_key(index), found)
    return [value.to(device) for _, value in sorted(values.items()) if isinstance(value, torch.Tensor)]

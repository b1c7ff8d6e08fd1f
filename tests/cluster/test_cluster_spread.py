"""Layers shared among Ray actors: the same bytes for one worker and for two, also when one of them dies."""

import os
import signal
from pathlib import Path

import pytest
import torch

from fourfold.cluster import check_workers, spread, spread_over
from fourfold.cluster.worker import LayerWorker
from fourfold.compress import Recipe, quantize
from fourfold.compress.calibration import CalibrationSet
from fourfold.core.errors import FourfoldError, UsageError

GPTQ = Recipe.model_validate(
    {"name": "own", "rules": [{"weight": "mxfp4"}], "passes": ["gptq"], "inputs": "original"}
)
TOKENS = CalibrationSet(torch.arange(4 * 32).view(4, 32) * 7 % 256, "counted", 0)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def make(
    source: Path, place: Path, workers: int | None = None, recipe: Recipe = GPTQ, progress=None
) -> dict[str, bytes]:
    place.mkdir()
    sharing = None if workers is None else spread_over(workers, str(source), recipe, "cpu")
    quantize(source, place / "out", recipe, calibration=TOKENS, spread=sharing, layer_progress=progress)
    return contents(place / "out")


@pytest.mark.slow
def test_workers_change_no_byte_and_may_die(tiny_llama, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    marker = str(tmp_path / "died")

    class Mortal(LayerWorker):
        """Dies in the middle of layer 1, once."""

        def make(self, index):
            if index == 1 and not os.path.exists(marker):  # noqa: PTH110 - pickled by value
                open(marker, "w").close()  # noqa: PTH123
                os.kill(os.getpid(), signal.SIGKILL)
            return super().make(index)

    monkeypatch.setattr(spread, "LayerWorker", Mortal)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = make(tiny_llama, tmp_path / "alone")
    finally:
        torch.set_num_threads(threads)
    told = []
    progress = lambda done, layers, name: told.append((done, layers))  # noqa: E731
    shared = make(tiny_llama, tmp_path / "shared", workers=2, progress=progress)
    assert Path(marker).exists()
    assert shared == alone
    assert told == [(0, 2), (1, 2), (2, 2)]


def test_the_inputs_are_those_of_the_original_model(tiny_llama, tmp_path):
    """And so differ from those after quantized layers, from the second layer on."""
    sequential = GPTQ.model_copy(update={"inputs": "quantized"})
    one, other = make(tiny_llama, tmp_path / "a"), make(tiny_llama, tmp_path / "b", recipe=sequential)
    assert one["model.safetensors"] != other["model.safetensors"]


def test_a_recipe_whose_layers_depend_on_each_other_is_refused():
    with pytest.raises(UsageError, match="inputs: original"):
        check_workers(GPTQ.model_copy(update={"inputs": "quantized"}))
    data_free = Recipe.model_validate({"name": "x", "rules": [{"weight": "mxfp4"}], "passes": ["rtn"]})
    with pytest.raises(UsageError, match="looks at no activations"):
        check_workers(data_free)


def test_without_ray_the_remedy_is_told(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(FourfoldError, match=r"pip install 'fourfold\[cluster\]'"):
        check_workers(GPTQ)

"""One decoder layer as a pass sees it, whose inputs have outlier channels as real ones do."""

from pathlib import Path

import torch
from compress_models import change_tensor
from tiny_models import build_tiny_model

from fourfold.compress.calibrated.loop import LayerLoop
from fourfold.compress.calibrated.store import LayerStore
from fourfold.compress.calibrated.work import LayerWork
from fourfold.compress.calibration import CalibrationSet
from fourfold.compress.pipeline import get_pass, options_of, prepare
from fourfold.compress.recipe import Recipe
from fourfold.compress.resolve import open_source, resolve


def tokens(count: int = 8, length: int = 32, seed: int = 0) -> CalibrationSet:
    """Random tokens, each sequence of few kinds, so that there is something to predict from."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(2, 250, (count, 6), generator=generator)
    choice = torch.randint(0, 6, (count, length), generator=generator)
    return CalibrationSet(kinds.gather(1, choice), "random", seed)


def build_model(folder: Path, **changes) -> Path:
    """A tiny llama with strong weights and two loud channels behind each norm."""
    model = build_tiny_model(folder, initializer_range=0.1, **changes)
    for index in range(changes.get("num_hidden_layers", 2)):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            change_tensor(model, f"model.layers.{index}.{norm}.weight", _louder)
    return model


def _louder(weight: torch.Tensor) -> torch.Tensor:
    weight = weight.clone()
    weight[[3, 40]] *= 12
    return weight


def recipe_of(*passes, weight: str = "mxfp4", activation: str | None = None) -> Recipe:
    return Recipe.model_validate(
        {"name": "test", "rules": [{"weight": weight, "activation": activation}], "passes": list(passes)}
    )


def at_work(
    model: Path, folder: Path, recipe: Recipe, calibration: CalibrationSet | None = None
) -> LayerWork:
    """Layer 0 of ``model``, before any pass of ``recipe``."""
    resolved = prepare(recipe, resolve(open_source(model), recipe).model)
    folder.mkdir(exist_ok=True)
    loop = LayerLoop(resolved, recipe, calibration or tokens(), LayerStore(folder), torch.device("cpu"))
    loop.start()
    return loop.begin(0)


def run_passes(work: LayerWork, recipe: Recipe) -> LayerWork:
    """The passes of ``recipe`` on ``work``."""
    for use in recipe.uses:
        layer = get_pass(use.name).layer
        if layer is not None:
            layer(work, options_of(use, "test"))
    return work


@torch.no_grad()
def output_error(work: LayerWork, original: list[torch.Tensor]) -> float:
    """The served layer's squared error, a share of the original outputs' squares."""
    work.serve()
    pairs = [(work.forward(hidden), target) for hidden, target in zip(work.inputs, original, strict=True)]
    noise = sum((found - wanted).square().sum() for found, wanted in pairs)
    return float(noise / sum(wanted.square().sum() for _, wanted in pairs))

"""A calibrated run: the calibration set made durable if the model writes it, then every layer finished."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from fourfold.checkpoint import CheckpointWriter
from fourfold.checkpoint.kv_scales import cached_projections
from fourfold.compress.calibrated.loop import LayerLoop, LayerProgress
from fourfold.compress.calibrated.memory import memory_kept, memory_told
from fourfold.compress.calibrated.store import LayerStore
from fourfold.compress.calibration import SELF_WRITTEN, Calibration, CalibrationSet, SelfWritten
from fourfold.compress.kv_calibration import scales
from fourfold.compress.model import Model
from fourfold.compress.pipeline import Tell
from fourfold.compress.recipe import Recipe

SEQUENCES_PER_PIECE = 32
TOKENS = "token_ids"

WritingProgress = Callable[[int, int], None]
"""Called as ``progress(done, samples)``."""

LearningProgress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, total)``."""

Spread = Callable[[LayerLoop, LayerProgress | None], None]
"""Finishes the layers of a loop in other processes, into its store."""


class Finished(NamedTuple):
    """What a calibrated run leaves for the shards and the manifest, and how to take its store away."""

    model: Model
    notes: list[str]
    calibration: dict[str, Any] | None
    tidy: Callable[[], None]


def finish_layers(
    writer: CheckpointWriter,
    prepared: Model,
    rounded: Model,
    recipe: Recipe,
    calibration: Calibration,
    device: torch.device,
    layer_progress: LayerProgress | None = None,
    writing_progress: WritingProgress | None = None,
    spread: Spread | None = None,
    learning_progress: LearningProgress | None = None,
) -> Finished:
    """``rounded`` with the tensors of ``recipe``'s passes over ``prepared`` in the place of its own.

    Layers that an interrupted run finished are taken from ``writer.work``; a run that had come as far as its
    manifest needs none of them any more. ``spread`` may finish layers elsewhere first.
    """
    store = LayerStore(writer.work)
    if (manifest := writer.interrupted_manifest()) is not None:
        return Finished(rounded, manifest.card.notes, manifest.calibration, store.remove)
    with memory_kept(), memory_told(device):
        tokens = settle(calibration, store, writing_progress)
        loop = LayerLoop(prepared, recipe, tokens, store, device)
        if learning_progress is not None:
            loop.tell = _telling(learning_progress)
        if spread is not None:
            spread(loop, layer_progress)
        made = loop.run(layer_progress)
    form = rounded.quantization.kv_cache
    writer.hold_kv_scales(scales(loop.kv, form, cached_projections(rounded.infos())))
    entries = {name: replace(rounded.entries[name], load=load) for name, load in made.items()}
    record = tokens.record() | loop.expert_record()
    return Finished(rounded.with_entries(entries), loop.notes, record, store.remove)


def _telling(progress: LearningProgress) -> Tell:
    def tell(what: str, done: int, total: int) -> bool:
        progress(what, done, total)
        return False

    return tell


def settle(
    calibration: Calibration, store: LayerStore, progress: WritingProgress | None = None
) -> CalibrationSet:
    """The calibration set itself. What the model writes is kept in ``store`` in pieces, and written once."""
    if isinstance(calibration, CalibrationSet):
        return calibration
    pieces = []
    for first in range(0, calibration.samples, SEQUENCES_PER_PIECE):
        pieces.append(_piece(calibration, store, first))
        if progress is not None:
            progress(min(first + SEQUENCES_PER_PIECE, calibration.samples), calibration.samples)
    return CalibrationSet(torch.cat(pieces), SELF_WRITTEN, calibration.seed)


def _piece(calibration: SelfWritten, store: LayerStore, first: int) -> torch.Tensor:
    key = f"calibration-{first:05d}"
    finished = store.find(key)
    if finished is None:
        count = min(SEQUENCES_PER_PIECE, calibration.samples - first)
        finished = store.save(key, {TOKENS: calibration.write(first, count)}, [])
    tokens = store.load_all(key, finished)[TOKENS]
    assert isinstance(tokens, torch.Tensor)
    return tokens

"""What a calibrated run will cost, from one of its layers that is really run.

The layer sees the whole calibration set, so its time and its peak memory are those of every layer like it;
others count by their parameters. Files are timed on the layer's own. What a run does once for the whole model
(``learn``) cannot be seen in a layer and is only named. The layer's files go to a temporary folder beside the
output and are gone when the prediction is there.
"""

import resource
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fourfold.checkpoint.digests import digest
from fourfold.compress.calibrated.loop import LayerLoop, key_of
from fourfold.compress.calibrated.memory import memory_kept, memory_told
from fourfold.compress.calibrated.run import SEQUENCES_PER_PIECE
from fourfold.compress.calibrated.store import LayerStore
from fourfold.compress.calibration import SELF_WRITTEN, Calibration, CalibrationSet
from fourfold.compress.model import Model
from fourfold.compress.recipe import Recipe
from fourfold.core.durable import writing
from fourfold.core.records import Record


class Prediction(Record):
    """Seconds and bytes of a whole run. ``peak_memory_bytes`` is up to the end of the last layer."""

    time_s: float
    layer_s: float
    peak_memory_bytes: int
    gpu_memory_bytes: int | None
    temporary_disk_bytes: int
    notes: list[str]


def predict(
    prepared: Model,
    recipe: Recipe,
    calibration: Calibration,
    device: torch.device,
    output_bytes: int,
    beside: Path,
    begun_s: float,
) -> Prediction:
    """Run one layer of ``prepared``, with its files in the folder ``beside``.

    ``begun_s`` is when the command began (time.perf_counter): what it did since counts as it is.
    """
    with (
        memory_kept(),
        memory_told(device),
        writing(beside),
        TemporaryDirectory(prefix=".fourfold-dry-run-", dir=beside) as folder,
    ):
        tokens, writing_s = _tokens(calibration)
        loop = LayerLoop(prepared, recipe, tokens, LayerStore(Path(folder)), device)
        learning = [chosen.name for chosen, _ in loop.passes if chosen.learn is not None]
        loop.passes = [(chosen, options) for chosen, options in loop.passes if chosen.learn is None]
        loop.start()
        loop.part_from_base()
        started_s = _since(begun_s, device)
        index, shares = representative(loop)
        begin_s = time.perf_counter()
        loop.step(index)
        layer_s = _since(begin_s, device)
        layer_bytes, file_s = _files(loop, index)
        copies = output_bytes / max(1, layer_bytes)
        return Prediction(
            time_s=started_s + writing_s + shares * layer_s + copies * file_s,
            layer_s=layer_s,
            peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            gpu_memory_bytes=torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None,
            temporary_disk_bytes=round(shares * layer_bytes),
            notes=[f"Not counted: what the pass {name} learns over the whole model." for name in learning],
        )


def representative(loop: LayerLoop) -> tuple[int, float]:
    """A layer of the most common kind, and how many of it the whole model is worth, by parameters."""
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in loop.skeleton.layers]
    common = Counter(sizes).most_common(1)[0][0]
    return sizes.index(common), sum(sizes) / common


def _tokens(calibration: Calibration) -> tuple[CalibrationSet, float]:
    """The calibration set, and the seconds it takes beyond what was spent already; what the model has yet to
    write is timed on its first piece, which then stands for all.
    """
    if isinstance(calibration, CalibrationSet):
        return calibration, 0.0
    count = min(SEQUENCES_PER_PIECE, calibration.samples)
    begin_s = time.perf_counter()
    piece = calibration.write(0, count)
    spent_s = time.perf_counter() - begin_s
    rows = torch.arange(calibration.samples) % count
    tokens = CalibrationSet(piece[rows], SELF_WRITTEN, calibration.seed)
    return tokens, spent_s * (calibration.samples / count - 1)


def _files(loop: LayerLoop, index: int) -> tuple[int, float]:
    """Bytes of the layer's finished tensors, and the seconds from its files to those of a checkpoint: read,
    digested, written, flushed and hashed, read back and digested.
    """
    key = key_of(index)
    finished = loop.store.find(key)
    assert finished is not None
    begin_s = time.perf_counter()
    for name in ("first", "second"):
        values = loop.store.load_all(key, finished)
        nbytes = sum(value.nbytes for value in values.values())
        for value in values.values():
            digest(value)
        if name == "first":
            loop.store.save("copy", values, [])
    return nbytes, time.perf_counter() - begin_s


def _since(begin_s: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin_s

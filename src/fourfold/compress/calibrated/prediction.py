"""What a calibrated run will cost, from one of its layers that is really run.

The layer sees the whole calibration set, so its time and its peak memory are those of every layer like it;
others count by their parameters. A short one is run twice, because its first time holds what libraries set up
once, which counted for every layer made 2.15 times the real time on a GPU that had just been started. Files
are timed on the layer's own. What passes learn over the whole model is begun, and ended once it is seen what
a step of it takes. Files go to a temporary folder beside the output and are gone when the prediction is
there.
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

LEAST_UNITS, ENOUGH_UNITS, ENOUGH_S = 2, 8, 10.0


class Prediction(Record):
    """Seconds and bytes of a whole run; ``layer_s`` is without what libraries set up once.
    ``peak_memory_bytes`` is up to the end of the last layer.
    """

    time_s: float
    layer_s: float
    peak_memory_bytes: int
    gpu_memory_bytes: int | None
    temporary_disk_bytes: int


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
        loop.tell = rehearsal = Rehearsal(device)
        loop.start()
        loop.part_from_base()
        started_s = _since(begun_s, device)
        index, shares = representative(loop)
        first_s, layer_s = _layer_times(loop, index)
        layers_s = first_s + (shares - 1) * layer_s
        layer_bytes, file_s = _files(loop, index)
        copies = output_bytes / max(1, layer_bytes)
        return Prediction(
            time_s=started_s + writing_s + rehearsal.left_s + layers_s + copies * file_s,
            layer_s=layer_s,
            peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            gpu_memory_bytes=torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None,
            temporary_disk_bytes=round(shares * layer_bytes) + _learned_bytes(loop),
        )


class Rehearsal:
    """A ``Tell`` that lets each kind of work go on until it is known what a unit of it takes; ``left_s`` is
    what the units that were left out would have taken.
    """

    def __init__(self, device: torch.device):
        self.device, self.left_s = device, 0.0
        self._seen: dict[str, list[tuple[float, int]]] = {}

    def __call__(self, what: str, done: int, total: int) -> bool:
        """Whether enough was seen. Its first half does not count: there, libraries set themselves up."""
        seen = self._seen.setdefault(what, [])
        seen.append((_since(0.0, self.device), done))
        (begin_s, _), (half_s, half), units = seen[0], seen[len(seen) // 2], len(seen) - 1
        now_s = seen[-1][0]
        if units < LEAST_UNITS or (units < ENOUGH_UNITS and now_s - begin_s < ENOUGH_S):
            return False
        self.left_s += (total - done) * (now_s - half_s) / (done - half)
        return True


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


def _layer_times(loop: LayerLoop, index: int) -> tuple[float, float]:
    """Seconds of the first layer that is made, and of every further one. The second time it gets what it gave
    the first time, and finds its weights in the system's cache.
    """
    first_s = _step_s(loop, index)
    if first_s >= ENOUGH_S:
        return first_s, first_s
    loop.store.discard(key_of(index))
    return first_s, _step_s(loop, index)


def _step_s(loop: LayerLoop, index: int) -> float:
    begin_s = time.perf_counter()
    loop.step(index)
    return _since(begin_s, loop.skeleton.device)


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


def _learned_bytes(loop: LayerLoop) -> int:
    names = [chosen.name for chosen, _ in loop.passes if chosen.learn is not None]
    return sum((loop.store.folder / f"{name}.safetensors").stat().st_size for name in names)


def _since(begin_s: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin_s

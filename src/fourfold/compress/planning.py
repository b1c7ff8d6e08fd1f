"""The dry run: what would be touched, how large the output is, what it would cost. Nothing is written.

The output size is the sum over the very plan that the writer works from, so it is exact. Memory is what the
process holds now, plus what the bound of :mod:`stream` admits at the worst place. Time comes from reading and
rounding one real tensor here and now, scaled by values and threads, plus one hash of the output; a disk that
writes slower than this machine hashes adds to it.

Where passes look at activations, one layer is really run, and time and memory are told from it
(:mod:`calibrated.prediction`).
"""

import hashlib
import mmap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from fourfold.checkpoint.card import weight_format
from fourfold.checkpoint.dialect import get_writable, module_of
from fourfold.checkpoint.kv_scales import unit_scales
from fourfold.checkpoint.plan import CheckpointPlan
from fourfold.checkpoint.writer import DEFAULT_SHARD_BYTES
from fourfold.compress.calibration import Calibration, CalibrationSet
from fourfold.compress.file_to_file import DEFAULT_DIALECT, notes_of
from fourfold.compress.model import Model
from fourfold.compress.pipeline import check_recipe, prepare, run_passes, takes_calibration
from fourfold.compress.recipe import Recipe, load_recipe
from fourfold.compress.resolve import open_source, resolve
from fourfold.compress.stream import fits
from fourfold.core.records import Record
from fourfold.formats import BlockTensor

if TYPE_CHECKING:
    from fourfold.compress.calibrated.prediction import Prediction

# parts of 2^18 values in a dozen temporaries; and the C library keeps freed pieces of up to 32 MiB a thread
SLACK_BYTES_PER_THREAD = (24 + 32) * 2**20
TIMED_BYTES = 64 * 2**20  # no larger tensor is timed, so that a dry run stays short


class TensorPlan(Record):
    """A tensor of the output: what it becomes, or why it is kept."""

    name: str
    shape: list[int]
    format: str
    scale_rule: str | None = None
    activation: str | None = None
    nbytes: int
    kept_because: str | None = None


class DryRun(Record):
    """What ``quantize`` would do. ``output_bytes`` counts tensors, without headers and other files.

    ``temporary_disk_bytes`` is needed beside them while a calibrated run lasts, for its finished layers.
    ``notes`` are those of the output's card that are known beforehand.
    """

    kind: Literal["fourfold.dry-run/1"] = "fourfold.dry-run/1"
    source: str
    recipe: str
    dialect: str
    kv_cache: str | None
    quantized: list[TensorPlan]
    kept: list[TensorPlan]
    source_bytes: int
    output_bytes: int
    shards: int
    peak_memory_bytes: int
    time_estimate_s: float
    calibration_samples: int | None = None
    calibration_sequence_tokens: int | None = None
    device: str = "cpu"
    gpu_memory_bytes: int | None = None
    temporary_disk_bytes: int = 0
    layer_s: float | None = None
    notes: list[str] = []


def plan(
    source: str | Path,
    recipe: str | Path | Recipe = "mxfp4",
    dialect: str = DEFAULT_DIALECT,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    calibration: Calibration | None = None,
    device: str = "cpu",
    beside: Path | None = None,
) -> DryRun:
    """What ``quantize`` would do with the same arguments, and what it costs. Raises as ``quantize`` does.

    With a ``calibration`` set, one layer is run; its files lie in a temporary folder in ``beside`` meanwhile.
    """
    begun_s = time.perf_counter()
    recipe = load_recipe(recipe)
    check_recipe(recipe)
    checkpoint = open_source(source)
    resolved = resolve(checkpoint, recipe)
    prepared = prepare(recipe, resolved.model)
    model = run_passes(recipe, prepared)
    kv_scales = unit_scales(model.quantization.kv_cache, model.infos(), checkpoint.config)
    layout = CheckpointPlan(
        get_writable(dialect), model.quantization, model.infos(), max_shard_bytes, kv_scales
    )
    output_bytes = sum(shard.nbytes for shard in layout.shards)
    tensors = [_tensor_plan(name, model, resolved.kept.get(name)) for name in model]
    record = DryRun(
        source=str(source),
        recipe=recipe.name,
        dialect=layout.written_dialect,
        kv_cache=model.quantization.kv_cache,
        quantized=[tensor for tensor in tensors if tensor.kept_because is None],
        kept=[tensor for tensor in tensors if tensor.kept_because is not None],
        source_bytes=sum(checkpoint.info(name).nbytes for name in checkpoint.names()),
        output_bytes=output_bytes,
        shards=len(layout.shards),
        peak_memory_bytes=predict_peak_bytes(model),
        time_estimate_s=estimate_time_s(model, output_bytes),
        notes=notes_of(checkpoint, resolved, model),
    )
    if calibration is None or not takes_calibration(recipe):
        return record
    from fourfold.compress.calibrated.prediction import predict

    found = predict(
        prepared, recipe, calibration, torch.device(device), output_bytes, beside or Path.cwd(), begun_s
    )
    return record.model_copy(update=_calibrated_fields(found, model, calibration, device))


def _calibrated_fields(
    found: "Prediction", model: Model, calibration: Calibration, device: str
) -> dict[str, object]:
    is_set = isinstance(calibration, CalibrationSet)
    samples, length = (
        calibration.token_ids.shape if is_set else (calibration.samples, calibration.sequence_tokens)
    )
    return {
        "peak_memory_bytes": max(found.peak_memory_bytes, predict_peak_bytes(model)),
        "time_estimate_s": found.time_s,
        "calibration_samples": samples,
        "calibration_sequence_tokens": length,
        "device": device,
        "gpu_memory_bytes": found.gpu_memory_bytes,
        "temporary_disk_bytes": found.temporary_disk_bytes,
        "layer_s": found.layer_s,
    }


def predict_peak_bytes(model: Model, threads: int | None = None) -> int:
    """Resident memory of this process at the worst place of streaming ``model``."""
    threads = threads or torch.get_num_threads()
    waiting: list[str] = []
    worst = 0
    for name in model:
        while waiting and not fits(model, waiting, name, threads):
            waiting.pop(0)
        waiting.append(name)
        worst = max(worst, _bytes_in_work(model, waiting))
    return _resident_bytes() + worst + threads * SLACK_BYTES_PER_THREAD


def estimate_time_s(model: Model, output_bytes: int, threads: int | None = None) -> float:
    """Seconds that streaming and hashing would take, from one tensor that is read and rounded now."""
    threads = threads or torch.get_num_threads()
    names = [name for name, entry in model.entries.items() if entry.info.format] or list(model)
    sample = _sample(model, names)
    value = model[sample]  # untimed: a first read may find a cold disk, a first operation starts torch up
    begin = time.perf_counter()
    value = model[sample]
    made = time.perf_counter()
    raw = value.blocks if isinstance(value, BlockTensor) else value
    hashlib.sha256(raw.reshape(-1).view(torch.uint8).numpy().data)
    hashed = time.perf_counter()
    values = sum(model.entries[name].info.numel for name in names)
    per_value_s = (made - begin) / max(1, model.entries[sample].info.numel)
    return per_value_s * values / threads + (hashed - made) / max(1, raw.nbytes) * output_bytes


def _sample(model: Model, names: list[str]) -> str:
    """The largest tensor that is quick to read, so that the cost of a call hardly counts."""

    def rank(name: str) -> tuple[bool, int]:
        size = model.entries[name].source.nbytes
        return (size > TIMED_BYTES, -size if size <= TIMED_BYTES else size)

    return min(names, key=rank)


def _bytes_in_work(model: Model, names: list[str]) -> int:
    """Bytes of the tensors being made: what they are read from, and the blocks or pieces they become."""
    entries = [model.entries[name] for name in names]
    sources = {entry.source.name: entry.source.nbytes for entry in entries}
    made = (entry.info.nbytes for entry in entries if entry.info is not entry.source)
    return sum(sources.values()) + sum(made)


def _resident_bytes() -> int:
    """What this process holds in memory now; 0 where the system does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * mmap.PAGESIZE if statm.is_file() else 0


def _tensor_plan(name: str, model: Model, kept_because: str | None) -> TensorPlan:
    info = model.entries[name].info
    scheme = None if kept_because else model.quantization.layer(module_of(name))
    return TensorPlan(
        name=name,
        shape=list(info.shape),
        format=weight_format([info]),
        scale_rule=scheme.scale_rule if scheme else None,
        activation=scheme.activation if scheme else None,
        nbytes=info.nbytes,
        kept_because=kept_because,
    )

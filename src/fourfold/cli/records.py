"""Records that only the command line makes."""

from typing import Any, Literal

from pydantic import Field

from fourfold.core.records import Frontier, Machine, ModelCard, Record


class QuantizationRecord(Record):
    """The result of ``fourfold quantize``: wall time, and the peak memory of this process, here and on a GPU.

    ``device`` is where layers were calibrated; what needs no calibration is computed on the CPU.
    """

    kind: Literal["fourfold.quantization/1"] = "fourfold.quantization/1"
    created: str
    source: str
    out: str
    recipe: str
    dialect: str
    source_card: ModelCard
    card: ModelCard
    calibration: dict[str, Any] | None = None
    frontier: Frontier | None = Field(default=None, description="with --budget: what it was chosen from")
    device: str = "cpu"
    seconds: float
    peak_memory_bytes: int
    peak_gpu_memory_bytes: int | None = None
    machine: Machine

"""Records that only the command line makes."""

from typing import Literal

from fourfold.core.records import Machine, ModelCard, Record


class QuantizationRecord(Record):
    """The result of ``fourfold quantize``: wall time, and the peak resident memory of this process."""

    kind: Literal["fourfold.quantization/1"] = "fourfold.quantization/1"
    created: str
    source: str
    out: str
    recipe: str
    dialect: str
    source_card: ModelCard
    card: ModelCard
    seconds: float
    peak_memory_bytes: int
    machine: Machine

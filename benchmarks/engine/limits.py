"""The machine's roofs (limits.cpp, compiled for it), and what they allow each engine in each row."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from results import Limits, ModelRun, Row

KV_BYTES = 2  # bfloat16 or float16 in every engine


class Probe:
    """limits.cpp, compiled into ``work`` with the system's C++ compiler; a call measures for a second."""

    def __init__(self, threads: int, work: Path):
        self.command = [str(work / "limits"), str(threads)]
        source = str(Path(__file__).with_name("limits.cpp"))
        flags = ["-O3", "-march=native", "-std=c++20", "-pthread"]
        subprocess.run(["c++", *flags, source, "-o", self.command[0]], check=True)

    def __call__(self) -> Limits:
        """The roofs of this moment."""
        found = subprocess.run(self.command, check=True, capture_output=True)
        return Limits.model_validate(json.loads(found.stdout))


@dataclass(frozen=True)
class Work:
    """What one step must at least read and compute, and how many tokens that gives."""

    tokens: int
    bytes_read: float
    operations: float
    bits: float

    @property
    def intensity(self) -> float:
        """Operations for each byte."""
        return self.operations / self.bytes_read

    def seconds(self, limits: Limits) -> dict[str, float]:
        """The least time of a step by each roof."""
        arithmetic = "bf16" if self.bits == 16 else "int8"
        peak = limits.bf16_ops_s if self.bits == 16 else limits.int8_ops_s
        return {"memory": self.bytes_read / limits.read_bytes_s, arithmetic: self.operations / peak}

    def limit(self, limits: Limits) -> float:
        """Tokens a second at which the nearer roof is reached."""
        return self.tokens / max(self.seconds(limits).values())

    def bound(self, limits: Limits) -> str:
        """Which roof that is."""
        seconds = self.seconds(limits)
        return max(seconds, key=lambda name: seconds[name])


def work_of(model: ModelRun, row: Row, bits: float) -> Work:
    """All matrices are read once a step and multiplied by every token of it; the KV cache is read once a
    token.

    Weights of fewer than 16 bits are counted against int8, others against bfloat16. Attention's own products
    are left out (they are few at these lengths), and so is the head for a prompt, of which only the last
    token needs it."""
    prefill = row.new_tokens == 1
    rows = row.prompt_tokens if prefill else row.batch
    context = 0 if prefill else row.prompt_tokens + row.new_tokens / 2
    kv = row.batch * context * model.kv_values_per_token * KV_BYTES
    values = model.matrix_values - (model.head_values if prefill else 0)
    return Work(rows, model.matrix_values * bits / 8 + kv, 2.0 * values * rows, bits)

"""What one run of run.py writes: every round of every row, and what the rows were checked against."""

import statistics

from pydantic import Field

from fourfold.core.records import Machine, Record


class Limits(Record):
    """The roofs of the machine, with the same number of threads as the engines.

    Other guests of a host move them, so they are measured in every round of every row; medians count.
    """

    read_bytes_s: float
    int8_ops_s: float
    bf16_ops_s: float

    @classmethod
    def median(cls, probes: list["Limits"]) -> "Limits":
        """Of each roof by itself."""
        fields = [probe.model_dump() for probe in probes]
        return cls.model_validate({name: statistics.median(f[name] for f in fields) for name in fields[0]})


class Row(Record):
    """One thing that is measured: a prompt of ``prompt_tokens`` (``new_tokens`` is 1), or decoding at a
    batch."""

    name: str
    batch: int
    prompt_tokens: int
    new_tokens: int


class Measured(Record):
    """Tokens a second of one engine in one row, a figure for each round, quiet and with busy cores."""

    row: str
    engine: str
    rounds: list[float]
    busy_rounds: list[float] = []
    gap_nats: float = Field(
        description="ln p that its tokens lose against the likeliest, by transformers on the same weights"
    )
    agreement: float = Field(description="share of its tokens that are the likeliest, by the same judge")
    model_gap_nats: float = Field(description="as gap_nats, by transformers on the model before rounding")

    @property
    def median(self) -> float:
        """The figure that counts."""
        return statistics.median(self.rounds)

    @property
    def busy_share(self) -> float | None:
        """Rate beside a busy process on every core, over the quiet rate."""
        return statistics.median(self.busy_rounds) / self.median if self.busy_rounds else None


class EngineFacts(Record):
    """One engine on one model."""

    engine: str
    file: str
    file_bytes: int
    versions: dict[str, str]
    load_s: float
    before_load_bytes: int = Field(description="resident after imports, before the model")
    peak_bytes: int = Field(description="the most that was ever resident")


class ModelRun(Record):
    """All rows of one model. ``matrix_values`` go through every token: decoder matrices and the head."""

    model: str
    matrix_values: int
    head_values: int
    kv_values_per_token: int
    rows: list[Row]
    engines: list[EngineFacts]
    measured: list[Measured]
    probes: dict[str, list[Limits]] = Field(description="the roofs in each row's rounds")

    def limits(self, row: str) -> Limits:
        """The roofs while ``row`` was measured."""
        return Limits.median(self.probes[row])

    def find(self, row: str, engine: str) -> Measured | None:
        """The figures of one engine in one row."""
        return next((m for m in self.measured if (m.row, m.engine) == (row, engine)), None)


class EngineBenchmark(Record):
    """The whole file."""

    created: str
    machine: Machine
    threads: int
    load_before: float = Field(
        description="load average when the run began: above ~0.3 the figures are noisy"
    )
    models: list[ModelRun]

    @property
    def limits(self) -> Limits:
        """The roofs over all rows of all models."""
        return Limits.median([p for model in self.models for row in model.probes.values() for p in row])

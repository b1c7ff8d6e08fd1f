"""What to measure, and the summary of what was."""

from pathlib import Path
from typing import Literal

from fourfold.bench.workload import Workload, get_workload
from fourfold.core.errors import FourfoldError, UsageError
from fourfold.core.machine import now
from fourfold.core.records import Record, RunRecord, RunSettings


class BenchPlan(Record):
    """What to measure. ``requests`` and ``warmup`` are per run; None takes the defaults written below."""

    profiles: list[str]
    concurrencies: list[int]
    scale: float = 1.0
    requests: int | None = None
    warmup: int | None = None
    seed: int = 0
    model: str | None = None
    tokenizer: str | None = None
    timeout_s: float = 600.0

    def workloads(self) -> list[Workload]:
        """The scaled workloads. Raises UsageError for an unknown name or a bad scale."""
        return [get_workload(name).scaled(self.scale) for name in self.profiles]

    def settings(self, workload: Workload, concurrency: int) -> RunSettings:
        """One run: twice as many requests as users, and at least 8; one warm-up request per user."""
        return RunSettings(
            profile=workload.name,
            concurrency=concurrency,
            input_tokens=workload.input_tokens,
            output_tokens=workload.output_tokens,
            requests=self.requests or max(2 * concurrency, 8),
            warmup_requests=concurrency if self.warmup is None else self.warmup,
            scale=self.scale,
            seed=self.seed,
        )

    def check(self) -> None:
        """Raises UsageError for numbers that make no sense."""
        if not self.profiles or not self.concurrencies:
            raise UsageError("Name at least one profile and one concurrency.")
        for name, value, least in [
            *(("--concurrency", c, 1) for c in self.concurrencies),
            ("--requests", 1 if self.requests is None else self.requests, 1),
            ("--warmup", self.warmup or 0, 0),
            ("--seed", self.seed, 0),
        ]:
            if value < least:
                raise UsageError(f"{name} {value} must be at least {least}.")


class RunSummary(Record):
    """One line of the summary: which run, where it lies, what came out."""

    file: str
    settings: RunSettings
    error_rate: float
    excluded: bool
    metrics: dict[str, float]


class BenchSummary(Record):
    """``fourfold bench --json``: every run of one call, without the requests."""

    kind: Literal["fourfold.bench/1"] = "fourfold.bench/1"
    created: str
    target: str
    runs: list[RunSummary]


def summarise(target: str, runs: list[tuple[Path, RunRecord]]) -> BenchSummary:
    """The summary that ``--json`` writes."""
    if not runs:
        raise FourfoldError(f"Nothing was measured on {target}.")
    lines = [
        RunSummary(
            file=path.name,
            settings=r.settings,
            error_rate=r.error_rate,
            excluded=r.excluded,
            metrics=r.metrics,
        )
        for path, r in runs
    ]
    return BenchSummary(created=now(), target=runs[0][1].target, runs=lines)

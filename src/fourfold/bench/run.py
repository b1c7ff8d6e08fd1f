"""From a target and a plan to RunRecords in a folder, one file for each profile and concurrency."""

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
from pydantic import ValidationError

from fourfold.bench.client import Client
from fourfold.bench.endpoint import Endpoint, discover
from fourfold.bench.load import Progress, measured_loop
from fourfold.bench.plan import BenchPlan
from fourfold.bench.prompts import (
    UNKNOWN_VOCABULARY,
    TokenRange,
    make_prompt,
    range_of_folder,
    range_of_tokenizer,
    range_within,
)
from fourfold.bench.record import make_record, run_notes
from fourfold.bench.target import is_url, public_target, serving
from fourfold.bench.transport import ToldTransport, new_event_loop
from fourfold.bench.workload import Workload
from fourfold.core.durable import write_file, writing
from fourfold.core.errors import UsageError
from fourfold.core.machine import now
from fourfold.core.records import RunRecord, RunSettings

OnRequest = Callable[[RunSettings, int, int], None]


def run(
    target: str,
    plan: BenchPlan,
    out: Path,
    on_request: OnRequest = lambda settings, done, total: None,
    headers: dict[str, str] | None = None,
) -> Iterator[tuple[Path, RunRecord]]:
    """Measure every profile at every concurrency, yielding each record once it is safely in ``out``.

    A record is written whole or not at all, so stopping in the middle keeps what was finished.
    Raises UsageError for a plan the server cannot take, FourfoldError when it cannot be reached.
    """
    plan.check()
    workloads = plan.workloads()
    make_folder(out)
    with serving(target) as url:
        endpoint = asyncio.run(discover_at(url, plan, headers))
        for workload in workloads:
            check_length(workload, endpoint)
        runs = [plan.settings(w, c) for w in workloads for c in plan.concurrencies]
        for settings in runs:
            refuse_foreign_record(record_path(out, settings), endpoint)
        session = Session(endpoint, token_range(target, plan, endpoint), plan.timeout_s, headers)
        for settings in runs:
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                progress = partial(on_request, settings)
                record = runner.run(session.measure(settings, public_target(target), progress))
            write_record(record_path(out, settings), record)
            yield record_path(out, settings), record


@dataclass(frozen=True)
class Session:
    """What all runs of one call share."""

    endpoint: Endpoint
    tokens: TokenRange
    timeout_s: float
    headers: dict[str, str] | None

    async def measure(self, settings: RunSettings, target: str, progress: Progress) -> RunRecord:
        """One run, on connections of its own, as a record."""
        warmup = self.prompts(settings, "warm-up", settings.warmup_requests)
        prompts = self.prompts(settings, "measured", settings.requests)
        shape = settings.output_tokens, settings.concurrency
        async with open_http(self.endpoint.base_url, self.timeout_s, self.headers) as http:
            client = Client(http, self.endpoint)
            created, cpu_s, wall_s = now(), time.process_time(), time.perf_counter()
            requests = await measured_loop(client, warmup, prompts, *shape, progress)
            busy = (time.process_time() - cpu_s) / max(time.perf_counter() - wall_s, 1e-9)
        notes = run_notes(client, self.tokens, busy)
        return make_record(created, target, self.endpoint, settings, requests, notes)

    def prompts(self, settings: RunSettings, part: str, count: int) -> list[list[int]]:
        """``count`` prompts that occur in no other run of this seed."""
        key = (settings.seed, settings.profile, settings.concurrency, part)
        return [make_prompt(self.tokens, settings.input_tokens, *key, i) for i in range(count)]


def open_http(url: str, timeout_s: float, headers: dict[str, str] | None) -> httpx.AsyncClient:
    """A client with no limit on connections that waits ``timeout_s`` for each piece of an answer.

    Raises UsageError for a URL that is none.
    """
    try:
        return httpx.AsyncClient(
            base_url=url,
            timeout=httpx.Timeout(timeout_s, connect=30),
            headers={"accept-encoding": "identity"} | (headers or {}),
            transport=ToldTransport(),
            trust_env=False,
        )
    except httpx.InvalidURL as error:
        raise UsageError(f"'{url}' is no URL ({error}). Write it like http://localhost:8000.") from error


async def discover_at(url: str, plan: BenchPlan, headers: dict[str, str] | None) -> Endpoint:
    """Who answers at ``url``, and how to ask."""
    async with open_http(url, plan.timeout_s, headers) as http:
        return await discover(http, url, plan.model)


def token_range(target: str, plan: BenchPlan, endpoint: Endpoint) -> TokenRange:
    """Which ids prompts are drawn from: the tokenizer given, else what server or folder say, else a small
    range."""
    if plan.tokenizer:
        return range_of_tokenizer(Path(plan.tokenizer))
    if endpoint.vocabulary:
        return range_within(endpoint.vocabulary, "the vocabulary the server tells")
    folder = None if is_url(target) else range_of_folder(Path(target))
    return folder or UNKNOWN_VOCABULARY


def check_length(workload: Workload, endpoint: Endpoint) -> None:
    """Raises UsageError when the server says that its sequences are shorter than the workload."""
    longest, needed = endpoint.max_positions, workload.input_tokens + workload.output_tokens
    if longest is not None and needed > longest:
        raise UsageError(
            f"Profile '{workload.name}' needs {needed} tokens a request; '{endpoint.model_name}' takes "
            f"{longest}. Make --scale smaller, or leave the profile out."
        )


def record_path(out: Path, settings: RunSettings) -> Path:
    """Where a run's record lies."""
    return out / f"{settings.profile}-c{settings.concurrency}.json"


def make_folder(out: Path) -> None:
    """Make the folder of the records. Raises UsageError when that cannot be done."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: this folder cannot be made ({error.strerror}).") from error


def write_record(path: Path, record: RunRecord) -> None:
    """Write a record, whole or not at all. Raises FourfoldError when the disk does not take it."""
    with writing(path):
        write_file(path, record.model_dump_json(indent=1))


def refuse_foreign_record(path: Path, endpoint: Endpoint) -> None:
    """Raises UsageError when ``path`` holds something other than an earlier run of the same model."""
    if not path.exists():
        return
    try:
        earlier = RunRecord.model_validate_json(path.read_text())
        same = (earlier.model_name, earlier.model) == (endpoint.model_name, endpoint.card)
    except (ValidationError, UnicodeDecodeError):
        same = False
    if not same:
        raise UsageError(
            f"{path} exists and is no run of '{endpoint.model_name}'. Give every model its own --out folder."
        )

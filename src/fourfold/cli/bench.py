"""``fourfold bench``: load a server, or a model served for the purpose, and record what it does."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from fourfold.core.records import RunRecord, RunSettings

COLUMNS = {
    "output_throughput_tok_s": "output\ntok/s",
    "ttft_ms_p50": "TTFT\np50 ms",
    "tpot_ms_p50": "TPOT\np50 ms",
    "itl_ms_p99": "ITL\np99 ms",
    "e2e_ms_p50": "whole\np50 ms",
}


def bench(
    target: Annotated[str, typer.Argument(help="URL of an OpenAI-compatible server, or a model to serve.")],
    out: Annotated[Path, typer.Option(help="Folder for the records, one per profile and concurrency.")],
    profile: Annotated[
        str, typer.Option(help="chat, generate, document, research; several with commas.")
    ] = "chat",
    concurrency: Annotated[
        str, typer.Option(help="Users at a time, each with one request in flight; several with commas.")
    ] = "1",
    scale: Annotated[
        float, typer.Option(help="Multiply the tokens of every profile, for small machines.")
    ] = 1.0,
    requests: Annotated[
        int | None, typer.Option(help="Requests per run. [default: twice the concurrency, at least 8]")
    ] = None,
    warmup: Annotated[
        int | None, typer.Option(help="Warm-up requests per run, not counted. [default: the concurrency]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides the prompts.")] = 0,
    model: Annotated[
        str | None, typer.Option(help="Which of the server's models. [default: the first]")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder with tokenizer.json, for servers that hide their vocabulary.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the next piece of an answer.")] = 600.0,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable that holds the server's API key.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write a summary of all runs here.")] = None,
) -> None:
    """Measure latency and throughput under a closed loop of users.

    Example: `fourfold bench my-mxfp4 --profile chat,document --concurrency 1,4,16 --scale 0.25 --out results`
    """
    from fourfold.bench import BenchPlan, run, summarise
    from fourfold.cli.output import check_json_path, write_json

    check_json_path(json)
    plan = BenchPlan(
        profiles=split(profile),
        concurrencies=[whole_number(c) for c in split(concurrency)],
        scale=scale,
        requests=requests,
        warmup=warmup,
        seed=seed,
        model=model,
        tokenizer=tokenizer,
        timeout_s=timeout,
    )
    with Display() as display:
        for path, record in run(target, plan, out, display.request_done, bearer(api_key_env)):
            display.add(path, record)
    write_json(json, summarise(target, display.runs))


def split(names: str) -> list[str]:
    """The parts of a comma-separated option."""
    return [part.strip() for part in names.split(",") if part.strip()]


def whole_number(text: str) -> int:
    """One concurrency. Raises UsageError when it is no number."""
    from fourfold.core.errors import UsageError

    try:
        return int(text)
    except ValueError:
        raise UsageError(f"--concurrency takes whole numbers such as 1,4,16; '{text}' is none.") from None


def bearer(variable: str | None) -> dict[str, str] | None:
    """The header for an API key. Raises UsageError when the variable is not set; the key is never
    recorded."""
    import os

    from fourfold.core.errors import UsageError

    if variable is None:
        return None
    if not os.environ.get(variable):
        raise UsageError(f"--api-key-env {variable}: this environment variable is not set.")
    return {"authorization": f"Bearer {os.environ[variable]}"}


class Display:
    """A table that grows by a row per run; on a terminal it also tells how far the present run is."""

    def __init__(self) -> None:
        from rich.live import Live

        from fourfold.cli.output import stdout

        self.console = stdout
        self.runs: list[tuple[Path, RunRecord]] = []
        self.status = "waiting for the server"
        self.live = Live(
            console=self.console, get_renderable=self.render, refresh_per_second=4, transient=True
        )

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *details: object) -> None:
        if self.console.is_terminal:
            self.live.stop()
        if self.runs:
            self.console.print(self.table())

    def request_done(self, settings: "RunSettings", done: int, total: int) -> None:
        """Called after every request."""
        self.status = f"{settings.profile}, {settings.concurrency} users: {done} of {total} requests"

    def add(self, path: Path, record: "RunRecord") -> None:
        """Called after every run."""
        self.runs.append((path, record))
        if not self.console.is_terminal:
            state = "excluded" if record.excluded else f"{record.duration_s:.1f} s"
            self.console.print(f"{path}: {state}", soft_wrap=True, markup=False)

    def render(self):
        """Table and status, for the terminal."""
        from rich.console import Group

        return Group(self.table(), self.status) if self.runs else self.status

    def table(self) -> "Table":
        """All runs so far; excluded runs show why and no figures."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        table = Table(title="closed-loop runs", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("profile", no_wrap=True)
        for name in ("tokens\nin/out", "users", *COLUMNS.values(), "errors"):
            table.add_column(name, justify="right")
        for _, record in self.runs:
            table.add_row(*row(record), style="dim" if record.excluded else None)
        for _, record in self.runs:
            if record.excluded:
                table.caption = f"excluded, more than 10 % errors; the first: {escape(first_error(record))}"
        return table


def row(record: "RunRecord") -> list[str]:
    """The cells of one run."""
    settings = record.settings
    cells = [
        settings.profile,
        f"{settings.input_tokens}/{settings.output_tokens}",
        str(settings.concurrency),
    ]
    figures = ["excluded" if record.excluded else figure(record.metrics.get(key)) for key in COLUMNS]
    return [*cells, *figures, f"{record.error_rate:.0%}"]


def figure(value: float | None) -> str:
    """Three digits, or a dash where there is nothing to show."""
    return "–" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def first_error(record: "RunRecord") -> str:
    """Why the first failed request of a run failed."""
    return next((r.error for r in record.requests if r.error), "")

"""The markdown of a run: every row with every engine, our ratio to the best peer, limits, memory, busy
cores."""

import statistics
from collections.abc import Callable

from contenders import CONTENDERS, OURS
from limits import work_of
from results import EngineBenchmark, Measured, ModelRun, Row

from fourfold.report.digits import figure, percent, ratio

BITS = {contender.name: contender.bits for contender in CONTENDERS}


def write_table(result: EngineBenchmark) -> str:
    """The whole text."""
    machine, limits = result.machine, result.limits
    head = (
        f"{machine.cpu}, {result.threads} threads, {result.created}; load average before: "
        f"{result.load_before:.1f}. Reads {limits.read_bytes_s / 1e9:.1f} GB/s, int8 "
        f"{limits.int8_ops_s / 1e9:.0f} GOPS, bf16 {limits.bf16_ops_s / 1e9:.0f} GFLOPS."
    )
    return "\n\n".join([head, *(part for model in result.models for part in model_parts(model))]) + "\n"


def model_parts(model: ModelRun) -> list[str]:
    """The tables of one model."""
    parts = [f"### {model.model}", speeds(model), limits_table(model), checks(model), memory(model)]
    return [*parts, *([busy(model)] if any(m.busy_rounds for m in model.measured) else [])]


def grid(header: list[str], lines: list[list[str]]) -> str:
    """A markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def per_engine(model: ModelRun, title: str, cell: Callable[[Measured], str]) -> str:
    """One line for each engine, one column for each row."""
    lines = [
        [facts.engine, *(cell(m) if (m := model.find(row.name, facts.engine)) else "" for row in model.rows)]
        for facts in model.engines
    ]
    return grid([title, *(row.name for row in model.rows)], lines)


def speeds(model: ModelRun) -> str:
    """Medians with their ranges, and ours against the best peer of each row."""

    def cell(m: Measured) -> str:
        return f"{figure(m.median)} ({figure(min(m.rounds))} – {figure(max(m.rounds))})"

    table = per_engine(model, "tokens/s, median (range)", cell)
    return (
        table
        + "\n"
        + "| "
        + " | ".join(["**ours / best peer**", *(against(model, r) for r in model.rows)])
        + " |"
    )


def against(model: ModelRun, row: Row) -> str:
    """Our median over the best peer's, of the peers that do not use our kernels."""
    ours = model.find(row.name, OURS)
    peers = [m for m in model.measured if m.row == row.name and "ourfold" not in m.engine]
    if ours is None or not peers:
        return ""
    best = max(peers, key=lambda m: m.median)
    return f"**{ratio(ours.median / best.median)}** ({best.engine})"


def limits_table(model: ModelRun) -> str:
    """What the roofs allow in each row, and how much of it each engine reached."""

    def cell(m: Measured) -> str:
        row = next(r for r in model.rows if r.name == m.row)
        work = work_of(model, row, BITS[m.engine])
        limits = model.limits(row.name)
        limit = work.limit(limits)
        return f"{percent(m.median / limit, 0)} of {figure(limit)} ({work.bound(limits)})"

    return per_engine(model, "share of its own limit", cell)


def checks(model: ModelRun) -> str:
    """How the timed tokens were judged."""

    def cell(m: Measured) -> str:
        return f"{m.gap_nats:.3f} ({percent(m.agreement, 0)}); {m.model_gap_nats:.3f}"

    return per_engine(model, "nats lost on the same weights (share likeliest); before rounding", cell)


def memory(model: ModelRun) -> str:
    """Sizes of files and processes."""
    lines = [
        [
            e.engine,
            ", ".join(f"{name} {version}" for name, version in e.versions.items()),
            f"{e.file_bytes / 1e6:,.0f}",
            f"{e.before_load_bytes / 1e6:,.0f}",
            f"{e.peak_bytes / 1e6:,.0f}",
            f"{e.load_s:.1f}",
        ]
        for e in model.engines
    ]
    return grid(
        ["engine", "version", "file, MB", "resident before loading, MB", "peak, MB", "load, s"], lines
    )


def busy(model: ModelRun) -> str:
    """Rates beside a busy process on every core."""
    lines = []
    for m in model.measured:
        if m.busy_share is not None:
            rate = figure(statistics.median(m.busy_rounds))
            lines.append([m.engine, m.row, figure(m.median), rate, percent(m.busy_share, 0)])
    return grid(["beside a busy process on each core", "row", "quiet", "busy", "share"], lines)

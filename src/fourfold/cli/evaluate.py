"""``fourfold evaluate``: is the model still good, and does it keep its gates?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fourfold.cli.kv_cache import KVCacheOption, check_kv_cache

if TYPE_CHECKING:
    from fourfold.core.records import EvaluationRecord, GateResult

COLUMNS = ("perplexity", "base", "ratio", "KL", "agreement")


def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder, GGUF file or hub name.")],
    against: Annotated[
        str | None, typer.Option(metavar="BASE", help="The model it was made from, to compare with.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Text to judge on instead of the package's own; may be repeated."),
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC=LIMIT",
            help="Exit with 1 when the value is worse than the limit: perplexity, perplexity_ratio, "
            "kl_divergence (at most), top1_agreement (at least). May be repeated.",
        ),
    ] = None,
    window_tokens: Annotated[int, typer.Option(help="Tokens the model reads at a time.")] = 512,
    max_tokens_per_text: Annotated[
        int, typer.Option(min=0, help="Tokens taken of each text, spread through it; 0 takes all.")
    ] = 4096,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; as many as cores by default.")
    ] = None,
    kv_cache: KVCacheOption = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures here.")] = None,
) -> None:
    """Perplexity with a 95 % interval, and KL divergence and agreement with the model it was made from.

    Example: `fourfold evaluate my-mxfp4 --against my-model --gate kl_divergence=0.05 --json quality.json`
    """
    from fourfold.cli.output import check_json_path, progress_bar, write_json
    from fourfold.engine import Engine, EngineConfig
    from fourfold.evaluate import default_texts, parse_gates, read_texts
    from fourfold.evaluate import evaluate as measure

    check_json_path(json)
    gates = parse_gates(gate or [], has_base=against is not None)
    texts = read_texts(text) if text else default_texts()
    # logits of whole windows go past the paged cache, so that one block of it is enough
    config = EngineConfig(threads=threads, kv_block_size=16, kv_cache_tokens=16)
    own = config.model_copy(update={"kv_cache": check_kv_cache(kv_cache)})  # the base stays as it is
    engine = Engine.load(model, own)
    base = None if against is None else Engine.load(against, config)
    with progress_bar("windows") as progress:
        record = measure(
            engine,
            base,
            texts,
            window_tokens=window_tokens,
            max_tokens_per_text=max_tokens_per_text or None,
            gates=gates,
            progress=progress,
        )
    write_json(json, record)
    show(record)
    if not all(result.passed for result in record.gates):
        raise typer.Exit(1)


def show(record: "EvaluationRecord") -> None:
    """Print the record for a person."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    from fourfold.cli.output import estimate_text, stdout

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("text", overflow="fold")
    for name in COLUMNS if record.base is not None else COLUMNS[:1]:
        table.add_column(name, justify="right", no_wrap=True)
    for name, quality in [*record.texts.items(), ("overall", record.overall)]:
        cells = [estimate_text(quality.perplexity, 2)]
        if record.base is not None:
            cells += [
                f"{quality.perplexity_base.value:.2f}" if quality.perplexity_base else "",
                estimate_text(quality.perplexity_ratio, 4),
                estimate_text(quality.kl_divergence, 4),
                estimate_text(quality.top1_agreement, 1, percent=True),
            ]
        table.add_row(escape(name), *cells, style="bold" if name == "overall" else None)
    stdout.print(_heading(record), soft_wrap=True)
    stdout.print(table)
    stdout.print(_remarks(record), soft_wrap=True)
    for result in record.gates:
        stdout.print(_verdict(record, result), soft_wrap=True)


def _heading(record: "EvaluationRecord") -> str:
    from rich.markup import escape

    cards = [record.model] if record.base is None else [record.model, record.base]
    lines = [
        f"{escape(card.name)}: {card.weight_format}, {card.bits_per_weight:.2f} bits per weight"
        for card in cards
    ]
    return "\nagainst ".join(lines)


def _remarks(record: "EvaluationRecord") -> str:
    from rich.markup import escape

    notes = {note for card in (record.model, record.base) if card is not None for note in card.notes}
    overall = record.overall
    windows = f"{overall.tokens} tokens scored in {overall.windows} windows of {record.window_tokens}"
    lines = [f"{windows}; below each value its 95 % interval."]
    if record.base is not None:
        lines += [
            "KL: mean KL(base || model), nats per token. Agreement: both have the same likeliest token."
        ]
    return "\n".join([*lines, *(f"Note: {escape(note)}" for note in sorted(notes))])


def _verdict(record: "EvaluationRecord", result: "GateResult") -> str:
    """One line for a gate: kept or not, and whether the interval leaves doubt."""
    from fourfold.evaluate import estimate_of

    estimate = estimate_of(record.overall, result.metric)
    word = "[green]kept[/green]" if result.passed else "[red]not kept[/red]"
    doubt = (
        " (the interval contains the limit: more text could turn this)"
        if estimate.low <= result.limit <= estimate.high
        else ""
    )
    return f"gate {result.metric} {result.limit:g}: {word} at {result.value:.5g}{doubt}"

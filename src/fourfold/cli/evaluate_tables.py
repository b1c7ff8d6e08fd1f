"""What ``fourfold evaluate`` prints: texts, positions, layers, scores and gates, each with its intervals."""

from collections.abc import Callable

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from fourfold.cli.output import estimate_text, stdout
from fourfold.core.records import (
    Estimate,
    EvaluationRecord,
    GateResult,
    LayerPicture,
    LinearError,
    ModelCard,
    ScoresRecord,
    TextQuality,
)

BAR_WIDTH = 24
EIGHTHS = " ▏▎▍▌▋▊▉█"
WORST_LINEARS = 5


def show(record: EvaluationRecord) -> None:
    """Print the record of a task that reads texts."""
    stdout.print(_heading(record), soft_wrap=True)
    stdout.print(_texts(record))
    if record.overall.tail_loss is not None:
        stdout.print(_tail(record))
    if record.positions:
        stdout.print(_positions(record))
    if record.layers:
        _show_layers(record.layers)
    stdout.print(_remarks(record), soft_wrap=True)
    for result in record.gates:
        stdout.print(_verdict(result, _measured(record.overall, result.metric)), soft_wrap=True)


def show_scores(record: ScoresRecord) -> None:
    """Print the record of a task that asks a served model."""
    stdout.print(_card_line(record.model) if record.model else escape(record.model_name), soft_wrap=True)
    table = _table("score", "value", "questions")
    for score in record.scores:
        table.add_row(escape(score.name), estimate_text(score.value, 4), str(score.questions))
    if record.scores:
        stdout.print(table)
    failed = [a for a in record.attempts if not a.passed]
    if record.attempts:
        stdout.print(f"{len(record.attempts) - len(failed)} of {len(record.attempts)} answers passed.")
    for note in record.notes:
        stdout.print(f"Note: {escape(note)}", soft_wrap=True)
    for result in record.gates:
        estimate = next(score.value for score in record.scores if score.name == result.metric)
        stdout.print(_verdict(result, estimate, "more questions"), soft_wrap=True)


def _table(first: str, *others: str) -> Table:
    """A table whose first column holds names and whose others hold figures."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _texts(record: EvaluationRecord) -> Table:
    """A row per text; columns for what was measured."""
    columns = {
        "perplexity": lambda q: estimate_text(q.perplexity, 2),
        "base": lambda q: f"{q.perplexity_base.value:.2f}" if q.perplexity_base else "",
        "ratio": lambda q: estimate_text(q.perplexity_ratio, 4),
        "KL": lambda q: estimate_text(q.kl_divergence, 4),
        "agreement": lambda q: estimate_text(q.top1_agreement, 1, percent=True),
    }
    return _by_text("text", columns, record)


def _tail(record: EvaluationRecord) -> Table:
    """The same for the rarest tenth of the tokens."""
    columns = {
        "loss": lambda q: estimate_text(q.tail_loss, 3),
        "base": lambda q: f"{q.tail_loss_base.value:.3f}" if q.tail_loss_base else "",
        "change": lambda q: estimate_text(q.tail_loss_increase, 3),
        "tokens": lambda q: str(q.tail_tokens),
    }
    return _by_text("rarest tenth", columns, record)


def _by_text(title: str, columns: dict[str, Callable[[TextQuality], str]], record: EvaluationRecord) -> Table:
    """A row per text and one over all, with the columns that have anything to say."""
    shown = {name: cell for name, cell in columns.items() if cell(record.overall)}
    table = _table(title, *shown)
    for name, quality in [*record.texts.items(), ("overall", record.overall)]:
        cells = [cell(quality) for cell in shown.values()]
        table.add_row(escape(name), *cells, style="bold" if name == "overall" else None)
    return table


def _positions(record: EvaluationRecord) -> Table:
    """A row per bucket of positions."""
    compared = record.base is not None
    table = _table("tokens before", "loss", *(("base", "change") if compared else ()), "tokens")
    for p in record.positions:
        cells = [estimate_text(p.loss, 3)]
        if compared:
            cells += [f"{p.loss_base.value:.3f}" if p.loss_base else "", estimate_text(p.loss_increase, 4)]
        table.add_row(f"{p.start} – {p.end - 1}", *cells, str(p.tokens))
    return table


def _show_layers(picture: LayerPicture) -> None:
    """A row and a bar per decoder layer, and the linears that lost most."""
    table = _table("layer", "KL, alone", "own error", "built up", "SQNR dB")
    table.add_column("KL, to the largest", no_wrap=True)
    largest = max(layer.kl_divergence.value for layer in picture.layers)
    for layer in picture.layers:
        own = [e.sqnr_db for e in picture.linears if e.layer == layer.layer and e.sqnr_db is not None]
        table.add_row(
            str(layer.layer),
            f"{layer.kl_divergence.value:.4f}",
            f"{layer.own_error:.2%}",
            f"{layer.built_up_error:.2%}",
            f"{sum(own) / len(own):.1f}" if own else "",
            bar(layer.kl_divergence.value / largest if largest else 0.0),
        )
    stdout.print(table)
    worst = sorted((e for e in picture.linears if e.sqnr_db is not None), key=lambda e: e.sqnr_db or 0.0)
    if worst:
        lines = ", ".join(map(_linear, worst[:WORST_LINEARS]))
        stdout.print(f"Weights that rounding moved most: {escape(lines)}.", soft_wrap=True)
    stdout.print(
        f"KL, alone: of the base with only this layer the model's, {picture.windows} windows of "
        f"{picture.window_tokens} tokens. Errors: of the states behind the layer, alone and with all before.",
        soft_wrap=True,
    )
    for note in picture.notes:
        stdout.print(f"Note: {escape(note)}", soft_wrap=True)


def _linear(error: LinearError) -> str:
    return f"{error.name} {error.sqnr_db:.1f} dB"


def bar(share: float) -> str:
    """A bar of up to BAR_WIDTH characters, in eighths of one."""
    eighths = round(share * BAR_WIDTH * 8)
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def _heading(record: EvaluationRecord) -> str:
    cards = [record.model] if record.base is None else [record.model, record.base]
    return "\nagainst ".join(map(_card_line, cards))


def _card_line(card: ModelCard) -> str:
    return f"{escape(card.name)}: {card.weight_format}, {card.bits_per_weight:.2f} bits per weight"


def _remarks(record: EvaluationRecord) -> str:
    notes = {note for card in (record.model, record.base) if card is not None for note in card.notes}
    overall = record.overall
    windows = f"{overall.tokens} tokens scored in {overall.windows} windows of {record.window_tokens}"
    lines = [f"{windows}; below each value its 95 % interval."]
    if overall.kl_divergence is not None:
        lines += [
            "KL: mean KL(base || model), nats per token. Agreement: both have the same likeliest token."
        ]
    if overall.tail_loss is not None:
        lines += ["Rarest tenth: mean loss on the tokens that are rarest in the texts, nats per token."]
    lines += [f"Computed: {escape(record.computed)}."] if record.computed else []
    return "\n".join([*lines, *(f"Note: {escape(note)}" for note in sorted(notes))])


def _measured(quality: TextQuality, metric: str) -> Estimate:
    from fourfold.evaluate import estimate_of

    return estimate_of(quality, metric)


def _verdict(result: GateResult, estimate: Estimate, more: str = "more text") -> str:
    """One line for a gate: kept or not, and whether the interval leaves doubt."""
    word = "[green]kept[/green]" if result.passed else "[red]not kept[/red]"
    doubt = (
        f" (the interval contains the limit: {more} could turn this)"
        if estimate.low <= result.limit <= estimate.high
        else ""
    )
    return f"gate {escape(result.metric)} {result.limit:g}: {word} at {result.value:.5g}{doubt}"

"""``--budget``: the recipe that is best within a budget, and the frontier it was chosen from."""

from pathlib import Path
from typing import TYPE_CHECKING

from fourfold.cli.output import bytes_text, progress_bar, stdout

if TYPE_CHECKING:
    from fourfold.cli.calibration import Asked
    from fourfold.compress import Recipe
    from fourfold.compress.calibration import Calibration
    from fourfold.core.records import Frontier

CHOSEN_FOR = "# chosen for "


def fit(
    model: str,
    recipe: "Recipe",
    dialect: str,
    budget: str,
    calibration: "Calibration",
    device: str,
) -> "tuple[Recipe, Frontier]":
    """``recipe`` with the formats that are best within ``budget``, and the frontier."""
    from fourfold.compress.budget.budgets import parse_budget
    from fourfold.compress.budget.fit import fit_budget
    from fourfold.compress.calibration import SELF_WRITTEN, CalibrationSet

    asked = parse_budget(budget)  # before the model writes a text
    if isinstance(calibration, CalibrationSet):
        tokens = calibration
    else:
        written = calibration.write(0, calibration.samples)
        tokens = CalibrationSet(written, SELF_WRITTEN, calibration.seed)
    with progress_bar("measuring") as update:
        return fit_budget(model, recipe, dialect, asked, tokens, device, update)


def measured_on(model: str, asked: "Asked", device: str) -> "Calibration":
    """What formats are measured on: at most 128 sequences of 128 tokens of the calibration text."""
    from fourfold.cli.calibration import choose_calibration
    from fourfold.compress.budget.fit import SEQUENCE_TOKENS, SEQUENCES

    samples, length = min(asked.samples, SEQUENCES), min(asked.sequence_tokens, SEQUENCE_TOKENS)
    return choose_calibration(model, asked._replace(samples=samples, sequence_tokens=length), device)


def choice_fingerprint(
    model: str, recipe: "Recipe", dialect: str, budget: str, calibration: "Calibration"
) -> dict[str, str]:
    """What a choice of formats was made for: an interrupted run's is used again only for the same."""
    from fourfold import __version__
    from fourfold.checkpoint import open_checkpoint
    from fourfold.checkpoint.fingerprint import short_hash, source_fingerprint

    return {
        "source": source_fingerprint(open_checkpoint(model)),
        "recipe": short_hash(recipe.model_dump()),
        "dialect": dialect,
        "budget": budget,
        "fourfold_version": __version__,
        **calibration.fingerprint,
    }


def recipe_file(out: Path) -> Path:
    """Where the recipe that was chosen is kept, for ``--resume`` and for other models."""
    return out.with_name(f"{out.name}-recipe.yaml")


def write_recipe(recipe: "Recipe", out: Path, chosen_for: dict[str, str]) -> None:
    """Keep ``recipe`` beside ``out``, with what it was chosen for in its first line."""
    import json

    import yaml
    from rich.markup import escape

    from fourfold.core.durable import write_file, writing

    path = recipe_file(out)
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    with writing(path):
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        write_file(path, f"{CHOSEN_FOR}{json.dumps(chosen_for)}\n{text}")
    stdout.print(f"Each layer's format is in {escape(str(path))}, a recipe.", soft_wrap=True)


def resumed_recipe(out: Path, chosen_for: dict[str, str]) -> "Recipe | None":
    """What an interrupted run chose: measured anew, costs may differ by a hair, and the choice with them.

    None where there is none yet. Raises UsageError for one that was made for something else.
    """
    import json

    from fourfold.compress import load_recipe
    from fourfold.core.errors import UsageError

    path = recipe_file(out)
    if not path.is_file():
        return None
    first_line = path.read_text("utf-8").partition("\n")[0]
    earlier = json.loads(first_line.removeprefix(CHOSEN_FOR)) if first_line.startswith(CHOSEN_FOR) else {}
    for field, now in chosen_for.items():
        if (then := earlier.get(field)) != now:
            raise UsageError(
                f"The formats in {path} were chosen with another {field}: {then} then, {now} now. Repeat the "
                "command as it was, or delete that file and the interrupted run to start anew."
            )
    return load_recipe(path)


def show_choice(record: "Frontier", out: Path) -> None:
    """Print the frontier, and draw it beside ``out``."""
    show_frontier(record)
    write_plot(record, out)


def show_frontier(record: "Frontier") -> None:
    """Print the frontier for a person."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="The best mixtures of formats, by size", title_justify="left")
    for column in ("bits a weight", "size", "predicted KL"):
        table.add_column(column, justify="right", no_wrap=column == "size")
    table.add_column("groups in each format")
    for index, point in enumerate(record.points):
        counts = ", ".join(f"{count} {form}" for form, count in point.groups.items())
        chosen = index == record.chosen
        table.add_row(
            f"{point.bits:.3f}",
            bytes_text(point.size_bytes),
            f"{point.predicted_kl:.2g}",
            f"{counts} (chosen)" if chosen else counts,
            style="bold" if chosen else "",
        )
    stdout.print(table)
    stdout.print(
        f"Formats of {len(record.groups)} groups of weights that serving fuses; KL from the original in nats "
        f"a token, told for rounding to nearest from {record.samples} sequences of {record.sequence_tokens} "
        "tokens.",
        soft_wrap=True,
    )
    for note in record.notes:
        stdout.print(f"Note: {escape(note)}", soft_wrap=True)


def write_plot(record: "Frontier", out: Path) -> None:
    """Draw the frontier beside ``out``."""
    from rich.markup import escape

    from fourfold.report.frontier import write_frontier

    page = out.with_name(f"{out.name}-frontier.html")
    page.absolute().parent.mkdir(parents=True, exist_ok=True)
    write_frontier(record, page)
    stdout.print(f"The frontier is drawn in {escape(str(page))}", soft_wrap=True)

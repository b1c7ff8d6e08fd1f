"""``--budget``: the recipe that is best within a budget, and the frontier it was chosen from."""

from pathlib import Path
from typing import TYPE_CHECKING

from fourfold.cli.output import bytes_text, progress_bar, stdout

if TYPE_CHECKING:
    from fourfold.cli.calibration import Asked
    from fourfold.compress import Recipe
    from fourfold.compress.calibration import CalibrationSet
    from fourfold.core.records import Frontier


def fit(
    model: str,
    recipe: "Recipe",
    dialect: str,
    budget: str,
    calibration: "Asked",
    device: str,
) -> "tuple[Recipe, Frontier]":
    """``recipe`` with the formats that are best within ``budget``, and the frontier.

    They are measured on at most 128 sequences of 128 tokens of the calibration text.
    """
    from fourfold.compress.budget.budgets import parse_budget
    from fourfold.compress.budget.fit import SEQUENCE_TOKENS, SEQUENCES, fit_budget

    asked = parse_budget(budget)  # before the model writes a text
    shorter = calibration._replace(
        samples=min(calibration.samples, SEQUENCES),
        sequence_tokens=min(calibration.sequence_tokens, SEQUENCE_TOKENS),
    )
    tokens = _tokens(model, shorter, device)
    with progress_bar("measuring") as update:
        return fit_budget(model, recipe, dialect, asked, tokens, device, update)


def _tokens(model: str, asked: "Asked", device: str) -> "CalibrationSet":
    from fourfold.cli.calibration import choose_calibration
    from fourfold.compress.calibration import SELF_WRITTEN, CalibrationSet

    found = choose_calibration(model, asked, device)
    if isinstance(found, CalibrationSet):
        return found
    return CalibrationSet(found.write(0, asked.samples), SELF_WRITTEN, asked.seed)


def recipe_file(out: Path) -> Path:
    """Where the recipe that was chosen is kept, for ``--resume`` and for other models."""
    return out.with_name(f"{out.name}-recipe.yaml")


def write_recipe(recipe: "Recipe", out: Path) -> None:
    """Keep ``recipe`` beside ``out``."""
    import yaml

    from fourfold.core.durable import write_file, writing

    path = recipe_file(out)
    with writing(path):
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        write_file(path, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def resumed_recipe(recipe: "Recipe", budget: str, out: Path) -> "Recipe | None":
    """What an interrupted run chose for the same recipe and budget: measured anew, costs may differ by a
    hair, and the choice with them.
    """
    from fourfold.compress import load_recipe
    from fourfold.compress.budget.fit import fitted_name

    path = recipe_file(out)
    if not path.is_file():
        return None
    kept = load_recipe(path)
    return kept if kept.name == fitted_name(recipe, budget) else None


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

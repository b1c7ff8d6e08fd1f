"""What a budget buys, judged: KL and loss of checkpoints of the smallest size, 4.5, 5 and 6 bits a weight.

    python benchmarks/accuracy/budget.py MODEL WORK --calibration TEXT --texts TEXT...

Formats are chosen by ``fourfold.compress.budget`` and weights rounded by RECIPE, to nearest unless told
otherwise; every checkpoint is judged beside MODEL by the same arithmetic (simulated.py) on the same windows.
Shares recovered are of what RECIPE's formats lose when rounded to nearest. Fails when the frontier, or what
was measured along it, is not monotone.
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path

import torch
from simulated import SimulatedModel, score

from fourfold.checkpoint import open_checkpoint
from fourfold.compress import Recipe, load_recipe, quantize
from fourfold.compress.budget.budgets import parse_budget
from fourfold.compress.budget.fit import measure, within
from fourfold.compress.calibration import CalibrationSet
from fourfold.compress.calibration_data import read_calibration
from fourfold.engine import Tokenizer

BUDGETS = ("4.5bits", "5bits", "6bits")


def main() -> None:
    """Choose, write, judge, print."""
    args = arguments()
    tokenizer = Tokenizer.load(open_checkpoint(args.model))
    calibration = read_calibration(args.calibration, tokenizer, args.samples, args.sequence_tokens, args.seed)
    windows = torch.cat(
        [windows_of(text, tokenizer, args.windows, args.window_tokens) for text in args.texts]
    )
    base = SimulatedModel(args.model, args.device)
    recipe = load_recipe(args.recipe)
    measured = measure(args.model, recipe, args.dialect, calibration, args.device)
    nearest = recipe.model_copy(update={"name": "rtn", "passes": ["rtn"]})
    unmixed = [nearest] if recipe.passes == nearest.passes else [nearest, recipe]
    rows = [judged(f"all by {one.name}", one, None, args, calibration, windows, base) for one in unmixed]
    for budget in args.budgets:
        fitted, frontier = within(measured, parse_budget(budget))
        check_monotone([point.predicted_kl for point in frontier.points], "the frontier's predicted KL")
        point = frontier.points[frontier.chosen]
        for row in rows[: len(unmixed)]:
            row |= {"predicted_kl": frontier.points[0].predicted_kl, "bits": frontier.points[0].bits}
        rows.append(judged(budget, fitted, point.predicted_kl, args, calibration, windows, base))
        rows[-1]["bits"] = point.bits
    report(rows, len(windows), args.json)
    check_monotone([row["kl"] for row in rows], "the measured KL")


def judged(
    label: str,
    recipe: Recipe,
    predicted_kl: float | None,
    args: argparse.Namespace,
    calibration: CalibrationSet,
    windows: torch.Tensor,
    base: SimulatedModel,
) -> dict:
    """KL and loss of MODEL by ``recipe``, nats a token."""
    out = args.work / label.replace(" ", "-")
    quantize(args.model, out, recipe, args.dialect, calibration=calibration, device=args.device)
    scores = score(SimulatedModel(out, args.device), base, windows)
    tokens = sum(s.tokens for s in scores)
    return {
        "label": label,
        "size_bytes": open_checkpoint(out).card().size_bytes,
        "predicted_kl": predicted_kl,
        "kl": sum(s.divergence for s in scores) / tokens,
        "loss_increase": sum(s.loss - s.loss_base for s in scores) / tokens,
        "top1": sum(s.agreed for s in scores) / tokens,
        "tokens": tokens,
    }


def report(rows: list[dict], windows: int, path: Path | None) -> None:
    """Print the table, and the share of what the first row lost that each wins back."""
    first = rows[0]
    for row in rows:
        row["kl_recovered"] = 1 - row["kl"] / first["kl"]
        row["loss_recovered"] = 1 - row["loss_increase"] / first["loss_increase"]
        print(
            f"{row['label']:>16}: {row['bits']:.3f} bits, {row['size_bytes'] / 1e6:.1f} MB, KL "
            f"{row['kl']:.5f} (predicted {row['predicted_kl']:.5f}), loss {row['loss_increase']:+.5f}, top-1 "
            f"{row['top1']:.4f}; recovered of KL {row['kl_recovered']:.1%}, of loss "
            f"{row['loss_recovered']:.1%}"
        )
    print(f"{first['tokens']} tokens in {windows} windows")
    if path is not None:
        path.write_text(json.dumps(rows, indent=2) + "\n")


def windows_of(text: Path, tokenizer: Tokenizer, count: int, length: int) -> torch.Tensor:
    """``count`` windows [count, length] at equal distances over ``text``."""
    ids = torch.tensor(tokenizer.encode(text.read_text()[: 400 * count * length]))
    starts = torch.linspace(0, len(ids) - length, count).long()
    return torch.stack([ids[start : start + length] for start in starts])


def check_monotone(values: list[float], what: str) -> None:
    """Fail where a value is above the one before it."""
    if any(after > before for before, after in pairwise(values)):
        raise SystemExit(f"{what} is not monotone: {values}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("work", type=Path, help="folder for the checkpoints; they must not be there yet")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--budgets", nargs="+", default=BUDGETS)
    parser.add_argument("--recipe", default="mxfp4")
    parser.add_argument("--dialect", default="compressed-tensors")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sequence-tokens", type=int, default=128)
    parser.add_argument("--windows", type=int, default=4, help="of each text")
    parser.add_argument("--window-tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()

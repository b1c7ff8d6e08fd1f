"""How much of what round-to-nearest loses does each method win back? One calibration, one evaluation for all.

python benchmarks/accuracy/compare.py MODEL --calibration TEXT --texts TEXT... --out RESULTS.json
    --recipe w4a16/distill=RECIPE.yaml ... --checkpoint w4a16/llm-compressor-gptq=0:FOLDER ...

Recipes are run by Fourfold once per seed; checkpoints are those that a peer made from the same tokens
(benchmarks/accuracy/tokens.py), given with their seed. ``--activation`` says what rounds the inputs of a
scheme where a checkpoint cannot; what a recipe makes is judged in the schemes of ``--also``, too. Every
result is added to RESULTS.json, and the table is printed from there, so that runs on several machines come
together (without MODEL's --recipe and --checkpoint it only prints).

The share of the gap that is closed is (L_rtn - L) / (L_rtn - L_base) of the mean losses, over all windows of
all texts. Its interval (95 %, Student) is over the seeds; asserted: the base's loss is the same in all runs.
"""

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from scipy.special import stdtrit
from simulated import SimulatedModel, score
from tokenizers import Tokenizer
from tokens import cut

from fourfold.checkpoint import open_checkpoint
from fourfold.compress import load_recipe, quantize
from fourfold.compress.calibration import CalibrationSet

WINDOW_TOKENS = 512


def main() -> None:
    """Run what was asked for, then print the table of everything in RESULTS.json."""
    options = parse()
    results = json.loads(options.out.read_text()) if options.out.exists() else []
    if options.recipe or options.checkpoint:
        bench = Bench(options)
        for label, recipe in options.recipe:
            for seed in options.seeds:
                results += bench.run_recipe(label, recipe, seed)
                options.out.write_text(json.dumps(results))
        for label, place in options.checkpoint:
            seed, _, folder = place.partition(":")
            results.append(bench.judge(label, int(seed), Path(folder)))
            options.out.write_text(json.dumps(results))
    print_table(results)


def parse() -> argparse.Namespace:
    """The command line."""

    def pair(text: str) -> tuple[str, str]:
        label, _, value = text.partition("=")
        return label, value

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--texts", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", type=pair, action="append", default=[])
    parser.add_argument("--checkpoint", type=pair, action="append", default=[])
    parser.add_argument("--activation", type=pair, action="append", default=[])
    parser.add_argument("--also", nargs="*", default=[], help="schemes with an --activation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--sequence-tokens", type=int, default=512)
    parser.add_argument("--windows-per-text", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if (options.recipe or options.checkpoint) and not options.texts:
        parser.error("--recipe and --checkpoint are judged on --texts")
    if options.recipe and not options.calibration:
        parser.error("--recipe needs --calibration")
    return options


class Bench:
    """The base model, the windows it is judged on, and the calibration tokens."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        folder = open_checkpoint(options.model).folder
        assert folder is not None, "the model must be a folder, because peers read folders"
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

        def encode(path: Path) -> torch.Tensor:
            return torch.tensor(tokenizer.encode(path.read_text(), add_special_tokens=False).ids)

        self.windows = {p.stem: windows(encode(p), options.windows_per_text) for p in options.texts}
        self.tokens = encode(options.calibration) if options.calibration else torch.empty(0)
        self.base = SimulatedModel(options.model, options.device)

    def run_recipe(self, label: str, recipe: str, seed: int) -> list[dict]:
        """Quantize by ``recipe`` with the tokens of ``seed``, and judge in all schemes."""
        options = self.options
        token_ids = cut(self.tokens, options.samples, options.sequence_tokens, seed)
        calibration = CalibrationSet(token_ids, str(options.calibration), seed)
        work = Path(tempfile.mkdtemp())
        begin = time.perf_counter()
        out = work / "out"
        quantize(options.model, out, load_recipe(recipe), calibration=calibration, device=options.device)
        seconds = time.perf_counter() - begin
        method = label.partition("/")[2]
        labels = [label, *(f"{scheme}/{method}" for scheme in options.also)]
        found = [self.judge(label, seed, out) | {"seconds": seconds} for label in labels]
        shutil.rmtree(work)
        return found

    def judge(self, label: str, seed: int, folder: Path) -> dict:
        """Scores of the checkpoint in ``folder``."""
        scheme = label.partition("/")[0]
        activation = dict(self.options.activation).get(scheme)
        model = SimulatedModel(folder, self.options.device, activation)
        scores = {name: score(model, self.base, w) for name, w in self.windows.items()}
        result = {
            "label": label,
            "seed": seed,
            "model": self.options.model.name,
            "device": self.options.device,
            "samples": self.options.samples,
            "sequence_tokens": self.options.sequence_tokens,
            "notes": model_notes(folder),
            "scores": {name: [asdict(s) for s in found] for name, found in scores.items()},
        }
        loss, base, kl, agreed = means(result)
        print(
            f"{label} seed {seed}: loss {loss:.4f} (base {base:.4f}), KL {kl:.4f}, agreement {agreed:.3f}",
            flush=True,
        )
        return result


def windows(ids: torch.Tensor, most: int) -> torch.Tensor:
    """At most ``most`` windows at equal distances, [n, WINDOW_TOKENS]."""
    count = len(ids) // WINDOW_TOKENS
    if count == 0:
        raise SystemExit(f"A text has {len(ids)} tokens, fewer than a window of {WINDOW_TOKENS}.")
    wanted = min(count, most)
    starts = [i * count // wanted * WINDOW_TOKENS for i in range(wanted)]
    return torch.stack([ids[s : s + WINDOW_TOKENS] for s in starts])


def model_notes(folder: Path) -> list[str]:
    """What the checkpoint says of how it was made."""
    return open_checkpoint(folder).notes


def means(result: dict) -> tuple[float, float, float, float]:
    """Loss, the base's loss, KL divergence and agreement per token over all texts."""
    found = [s for text in result["scores"].values() for s in text]
    tokens = sum(s["tokens"] for s in found)
    sums = (sum(s[k] for s in found) for k in ("loss", "loss_base", "divergence", "agreed"))
    loss, base, kl, agreed = (total / tokens for total in sums)
    return loss, base, kl, agreed


def print_table(results: list[dict]) -> None:
    """Per model and scheme every method's perplexity ratio, KL, and the share of RTN's gap that it closes."""
    for model, scheme in sorted({(r["model"], r["label"].partition("/")[0]) for r in results}):
        group = [r for r in results if r["model"] == model and r["label"].startswith(scheme + "/")]
        losses = {means(r)[1] for r in group}
        assert max(losses) - min(losses) < 1e-3, f"the base differs between runs: {losses}"
        nearest = next((r for r in group if r["label"].endswith("/rtn")), None)
        print(f"\n{model} {scheme}")
        for label in dict.fromkeys(r["label"] for r in group):
            print_row(label, [r for r in group if r["label"] == label], nearest)


def print_row(label: str, runs: list[dict], nearest: dict | None) -> None:
    """One method: means over its seeds."""
    found = np.array([means(r) for r in runs])
    ratio = np.exp(found[:, 0] - found[:, 1])
    line = f"  {label:34s} seeds {len(runs)}  ppl ratio {ratio.mean():.4f}  KL {found[:, 2].mean():.4f}"
    line += f"  agreement {found[:, 3].mean():.3f}"
    if nearest is not None and not label.endswith("/rtn"):
        loss, base, kl, _ = means(nearest)
        line += "  gap closed " + interval((loss - found[:, 0]) / (loss - base))
        line += "  KL closed " + interval(1 - found[:, 2] / kl)
    seconds = [r["seconds"] for r in runs if "seconds" in r]
    print(line + (f"  {np.mean(seconds):.0f} s" if seconds else ""))


def interval(values: np.ndarray) -> str:
    """Mean and 95 % Student interval over seeds, as percentages."""
    text = f"{100 * values.mean():.1f} %"
    if len(values) < 2:
        return text
    reach = stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / len(values) ** 0.5
    return text + f" [{100 * (values.mean() - reach):.1f}, {100 * (values.mean() + reach):.1f}]"


if __name__ == "__main__":
    main()

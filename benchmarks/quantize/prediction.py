"""How near `fourfold quantize --dry-run` comes to what the run then costs.

python benchmarks/quantize/prediction.py MODEL --recipe RECIPE --calibration TEXT --samples 16 [...]

All but MODEL and --rounds goes to the command. The dry run and the run are processes of their own, in turns.
Printed are predicted and measured seconds and peak memory (of the GPU too where there is one), and their
ratios; exit 1 when a median is more than a quarter off.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

BAR = 0.25
FIGURES = {  # what is compared: its name in the dry run's record, and in the run's
    "time, s": ("time_estimate_s", "seconds"),
    "memory, bytes": ("peak_memory_bytes", "peak_memory_bytes"),
    "GPU memory, bytes": ("gpu_memory_bytes", "peak_gpu_memory_bytes"),
}


def fourfold(*words: object) -> None:
    """Run the command, quietly. Exits with what it said when it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "fourfold", *map(str, words)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)


def compare(command: list[object], work: Path) -> dict[str, tuple[float, float]]:
    """Predicted and measured values by the name of the figure."""
    fourfold(*command, "--dry-run", "--json", work / "plan.json")
    shutil.rmtree(work / "out", ignore_errors=True)
    fourfold(*command, "--json", work / "run.json")
    predicted, measured = (json.loads((work / name).read_text()) for name in ("plan.json", "run.json"))
    return {
        figure: (predicted[before], measured[after])
        for figure, (before, after) in FIGURES.items()
        if predicted.get(before) is not None
    }


def main() -> int:
    """Measure in rounds, print, and judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options, rest = parser.parse_known_args()
    found: list[dict[str, tuple[float, float]]] = []
    with tempfile.TemporaryDirectory(prefix="prediction-") as folder:
        for _ in range(options.rounds):
            command = ["quantize", options.model, Path(folder) / "out", *rest]
            found.append(compare(command, Path(folder)))
            print("; ".join(f"{f}: {p:.4g} for {m:.4g}" for f, (p, m) in found[-1].items()), flush=True)
    good = True
    for figure in found[0]:
        ratios = [predicted / measured for predicted, measured in (one[figure] for one in found)]
        median = statistics.median(ratios)
        good &= abs(median - 1) <= BAR
        print(f"{figure}: predicted / measured {median:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

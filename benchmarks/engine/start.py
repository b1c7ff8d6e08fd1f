"""From the start of a process to its first token, and the memory it took, beside llama.cpp.

python benchmarks/engine/start.py MODELS... --python-llamacpp LC/bin/python

MODELS are folders that models.py prepared, their files in the system's cache. Every measurement is a process
of its own, all kinds in turn: ours with its packed weights still to be made ("first") and made ("cached"),
llama.cpp, and the command `fourfold generate`, of which only the time to its first character is seen. Medians
and ranges. Memory is the peak of the process, and what of it is not the imports'. Prints a table.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from contenders import CONTENDERS, OURS, Process
from table import grid

PROMPT = list(range(100, 116))  # token ids; what they say does not matter
PACKED = ".fourfold-packed"
Taken = dict[str, float]


def start(name: str, model: Path, python: str, threads: int, tokens: int) -> Taken:
    """One process of the engine ``name``: seconds and megabytes."""
    contender = next(c for c in CONTENDERS if c.name == name)
    with tempfile.TemporaryFile() as log:
        begin = time.perf_counter()
        process = Process(contender, python, threads, log)
        try:
            path = str(model / contender.file)
            load = process.ask("load", model=path, settings={}, threads=threads, sequences=1, tokens=tokens)
            answer = process.ask("generate", prompts=[PROMPT], count=1)
            seconds = time.perf_counter() - begin
            memory = process.ask("memory")
        finally:
            process.close()
    assert len(answer["tokens"][0]) == 1
    peak, imports = memory["peak_bytes"] / 1e6, load["before_bytes"] / 1e6
    loaded = load["seconds"] + answer["first_s"]
    return {"start": seconds, "loaded": loaded, "peak": peak, "above": peak - imports}


def command(model: Path, threads: int) -> Taken:
    """`fourfold generate` to its first character."""
    words = [sys.executable, "-m", "fourfold", "generate", str(model / "mxfp4"), "--prompt", "The capital of"]
    begin = time.perf_counter()
    with subprocess.Popen([*words, "--threads", str(threads)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and os.read(process.stdout.fileno(), 1)
        seconds = time.perf_counter() - begin
        process.kill()
    return {"start": seconds}


def measured(model: Path, options: argparse.Namespace) -> dict[str, list[Taken]]:
    """Every kind in turn, ``options.rounds`` times, after one time that is not counted."""

    def ours(first: bool) -> Taken:
        if first:
            shutil.rmtree(model / "mxfp4" / PACKED, ignore_errors=True)
        return start(OURS, model, sys.executable, options.threads, options.tokens)

    kinds: dict[str, Callable[[], Taken]] = {
        f"{OURS}, first": lambda: ours(True),
        f"{OURS}, cached": lambda: ours(False),
        "`fourfold generate`, cached": lambda: command(model, options.threads),
    }
    if options.python_llamacpp:
        peer, python = "llama.cpp MXFP4", options.python_llamacpp
        kinds[peer] = lambda: start(peer, model, python, options.threads, options.tokens)
    taken: dict[str, list[Taken]] = {kind: [] for kind in kinds}
    for turn in range(options.rounds + 1):
        for kind, take in kinds.items():
            one = take()
            if turn:
                taken[kind].append(one)
    return taken


def table(taken: dict[str, list[Taken]]) -> str:
    """Medians with their ranges."""

    def cell(kind: str, column: str, digits: int) -> str:
        values = [one[column] for one in taken[kind] if column in one]
        if not values:
            return ""
        low, middle, high = (f"{f(values):.{digits}f}" for f in (min, statistics.median, max))
        return f"{middle} ({low} – {high})"

    columns = [("start", 2), ("loaded", 2), ("peak", 0), ("above", 0)]
    header = ["", "start to first token, s", "of it after imports", "peak memory, MB", "of it above imports"]
    return grid(header, [[kind, *(cell(kind, *column) for column in columns)] for kind in taken])


def sizes(model: Path, tokens: int) -> str:
    """What has to be in memory."""
    config = json.loads((model / "mxfp4" / "config.json").read_text())
    values = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    packed = sum(file.stat().st_size for file in (model / "mxfp4" / PACKED).iterdir()) / 1e6
    cache = 2 * values * tokens / 1e6
    return f"packed weights {packed:.0f} MB, KV cache of {tokens} tokens {cache:.0f} MB as configured"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--python-llamacpp")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048, help="what the KV cache holds")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="start-") as empty:
        os.environ["XDG_CACHE_HOME"] = empty  # packed weights there would make a first start a later one
        for model in options.models:
            load, taken = os.getloadavg()[0], measured(model, options)
            print(f"### {model.name}: {sizes(model, options.tokens)}; load average before {load:.1f}\n")
            print(table(taken) + "\n", flush=True)


if __name__ == "__main__":
    main()

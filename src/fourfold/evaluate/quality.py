"""Evaluate a model in memory, alone or beside its base: the record that gates and reports read."""

from collections.abc import Callable, Sequence
from typing import Any

from fourfold.core.errors import UsageError
from fourfold.core.machine import describe_machine, now
from fourfold.core.protocols import LanguageModel
from fourfold.core.records import EvaluationRecord
from fourfold.core.registry import Registry
from fourfold.evaluate.gates import Gate
from fourfold.evaluate.task import ServedTask, Task

DEFAULT_TOKENS_PER_TEXT = 4096

_tasks = Registry("fourfold.evaluate.tasks", "TASK", "evaluation task")


def task_names() -> list[str]:
    """The names of all tasks."""
    return _tasks.names()


def get_task(name: str) -> Task | ServedTask:
    """The task called ``name``. Raises UsageError for a name that is not listed."""
    return _tasks.get(name)


def evaluate(
    model: LanguageModel,
    base: LanguageModel | None,
    texts: dict[str, str],
    *,
    task: str = "heldout",
    window_tokens: int | None = None,
    max_tokens_per_text: int | None = DEFAULT_TOKENS_PER_TEXT,
    gates: Sequence[Gate] = (),
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationRecord:
    """Quality of ``model`` on ``texts`` (name -> text), and against ``base`` where one is given.

    Both models stay loaded; each window is run through one, then the other. ``window_tokens`` None is the
    task's own length, ``max_tokens_per_text`` None reads the texts whole. Raises UsageError for a window the
    models cannot take, FourfoldError for texts too short, tokenizers that differ, or logits that are not
    finite.
    """
    if not texts:
        raise UsageError("There is no text to evaluate on: give at least one.")
    chosen = get_task(task)
    if isinstance(chosen, ServedTask):
        raise UsageError(f"The task '{task}' asks a served model: use evaluate_served, or the command line.")
    measured = chosen.run(model, base, texts, window_tokens, max_tokens_per_text, progress or _silent)
    return EvaluationRecord(
        created=now(),
        model=model.card,
        base=None if base is None else base.card,
        overall=measured.overall,
        texts=measured.texts,
        gates=[gate.judge(measured.overall) for gate in gates],
        task=task,
        method=chosen.method,
        window_tokens=measured.window_tokens,
        max_tokens_per_text=max_tokens_per_text,
        positions=measured.positions,
        machine=describe_machine(),
    )


def _silent(*_: Any) -> None:
    """No progress is shown."""

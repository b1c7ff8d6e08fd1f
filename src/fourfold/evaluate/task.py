"""What an evaluation task is: one module in ``evaluate/tasks/`` that exports TASK.

There are two kinds. A ``Task`` reads texts with models in memory; a ``ServedTask`` asks questions over HTTP.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from fourfold.core.protocols import LanguageModel
from fourfold.core.records import Attempt, PositionLoss, Score, TextQuality

if TYPE_CHECKING:
    from fourfold.evaluate.endpoint import Endpoint
    from fourfold.evaluate.served import ServedOptions

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Measured:
    """What a task found over all texts and per text, with the window length it used."""

    overall: TextQuality
    texts: dict[str, TextQuality]
    window_tokens: int
    positions: list[PositionLoss] = field(default_factory=list)


class Measure(Protocol):
    """Runs the models over the texts."""

    def __call__(
        self,
        model: LanguageModel,
        base: LanguageModel | None,
        texts: dict[str, str],
        window_tokens: int | None,
        max_tokens_per_text: int | None,
        progress: Progress,
    ) -> Measured:
        """``window_tokens`` None: the task's choice. ``progress(done, total)`` is told of every window."""
        ...


@dataclass(frozen=True)
class Task:
    """How to measure, the method in words for the record, and the metrics that gates may name."""

    run: Measure
    method: str
    gates: tuple[str, ...]
    max_tokens_per_text: int | None


@dataclass(frozen=True)
class Answered:
    """What a served task found."""

    scores: list[Score]
    attempts: list[Attempt] = field(default_factory=list)
    settings: dict[str, str | int | float | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Ask(Protocol):
    """Asks the model behind an endpoint; ``argument`` is what follows the task's name and a colon."""

    def __call__(
        self, endpoint: "Endpoint", argument: str, options: "ServedOptions", progress: Progress
    ) -> Answered:
        """``progress(done, total)`` is told of every piece of work that is done."""
        ...


class Check(Protocol):
    """Raises UsageError for an argument or options that cannot be, before any model is loaded."""

    def __call__(self, argument: str, options: "ServedOptions") -> None:
        """Look, and do nothing else."""
        ...


class Names(Protocol):
    """The beginnings of the names that the scores will have, as far as they are known before."""

    def __call__(self, argument: str, options: "ServedOptions") -> list[str]:
        """Whole names, or what the names begin with."""
        ...


@dataclass(frozen=True)
class ServedTask:
    """How to ask, what to check before, what will be scored, and the method in words for the record."""

    ask: Ask
    check: Check
    names: Names
    method: str

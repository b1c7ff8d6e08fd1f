"""What an evaluation task is: one module in ``evaluate/tasks/`` that exports TASK."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from fourfold.core.protocols import LanguageModel
from fourfold.core.records import TextQuality


class Measure(Protocol):
    """Runs the models over the texts; returns the quality over all texts, and per text."""

    def __call__(
        self,
        model: LanguageModel,
        base: LanguageModel | None,
        texts: dict[str, str],
        window_tokens: int,
        max_tokens_per_text: int | None,
        progress: Callable[[int, int], None],
    ) -> tuple[TextQuality, dict[str, TextQuality]]:
        """``progress(done, total)`` is told of every piece of work that is done."""
        ...


@dataclass(frozen=True)
class Task:
    """How to measure, and the method in words for the record."""

    run: Measure
    method: str

"""The stages of a calibrated run under one display: what the model writes, its layers, the files."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from fourfold.cli.output import stderr

LINE_EVERY_S = 60.0


class Stages:
    """Bars on a terminal; elsewhere, where nobody can watch, a line a minute."""

    def __init__(self, bars: Progress):
        self.bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._begin: dict[str, tuple[float, int]] = {}
        self._told_s = time.monotonic()

    def sequences(self, done: int, total: int) -> None:
        """Calibration sequences that the model has written."""
        self._update("writing calibration text", "sequences", done, total)

    def learned(self, what: str, done: int, total: int) -> None:
        """Steps of what a pass learns over the whole model."""
        self._update(what, "steps", done, total)

    def layers(self, done: int, total: int, name: str) -> None:
        """Finished layers, ``name`` the last of them."""
        self._update("calibrating", name, done, total)

    def written(self, done: int, total: int, name: str) -> None:
        """Bytes of the output."""
        self._update("writing (kB)", name, done // 1000, total // 1000)

    def _update(self, stage: str, what: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self.bars.add_task(stage, total=total, left="")
        if done <= self._begin.get(stage, (0.0, done))[1]:  # nothing is done yet: time counts from now on
            self._begin[stage] = (time.monotonic(), done)
        left = self._left(stage, done, total)
        self.bars.update(
            self._tasks[stage], completed=done, total=total, description=f"{stage} {what}", left=left
        )
        if self.bars.disable and time.monotonic() - self._told_s >= LINE_EVERY_S:
            self._told_s = time.monotonic()
            stderr.print(f"{stage}: {done} of {total} ({what}){left and f', {left}'}", markup=False)

    def _left(self, stage: str, done: int, total: int) -> str:
        begin_s, begun = self._begin[stage]
        if done <= begun:
            return ""
        left_s = (time.monotonic() - begin_s) / (done - begun) * (total - done)
        return f"about {duration_text(left_s)} left"


@contextmanager
def stages() -> Iterator[Stages]:
    """The display, gone when the work is done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bars:
        yield Stages(bars)


def duration_text(seconds: float) -> str:
    """Seconds in the unit a person would choose: 12.3 s, 4.5 min, 6.7 h."""
    divisor, unit = (1, "s") if seconds < 120 else (60, "min") if seconds < 7200 else (3600, "h")
    return f"{seconds / divisor:.1f} {unit}"

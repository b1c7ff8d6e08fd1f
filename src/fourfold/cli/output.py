"""What the verbs share in speaking to a person: tables on stdout, progress on stderr, figures in a file."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel
from rich.console import Console

from fourfold.core.durable import write_file, writing
from fourfold.core.errors import UsageError
from fourfold.core.records import Estimate

# what comes from outside (names, paths, notes) goes through rich.markup.escape: [brackets] are markup here
stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)


def check_json_path(path: Path | None) -> None:
    """Make the folder of a ``--json`` file; refuse one that cannot be written, before any work is done."""
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"--json {path} is a folder. Name a file.")
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--json {path}: its folder cannot be made ({error.strerror}).") from error


def write_json(path: Path | None, record: BaseModel) -> None:
    """Write ``record`` to ``path``, whole or not at all. None writes nothing."""
    if path is None:
        return
    with writing(path):
        write_file(path, record.model_dump_json(indent=2) + "\n")


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, if that is a terminal, gone when the work is done; yields ``update(done, total)``."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def bytes_bar(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """The same for bytes; yields ``update(done, total, name of what was done last)``."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total, name: bar.update(
            task, completed=done, total=total, description=f"{label} {name}"
        )


def bytes_text(count: float) -> str:
    """Bytes in decimal units: 12.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def estimate_text(estimate: Estimate | None, digits: int = 3, percent: bool = False) -> str:
    """``value`` above ``low – high``, for a cell of a table."""
    if estimate is None:
        return ""
    scale, unit = (100, " %") if percent else (1, "")

    def number(x: float) -> str:
        return f"{x * scale:.{digits}f}" if abs(x) < 1e6 else f"{x:.1e}"

    return f"{number(estimate.value)}{unit}\n[dim]{number(estimate.low)}–{number(estimate.high)}[/dim]"

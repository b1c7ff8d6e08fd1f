"""``fourfold WORDS`` run in this process: through main, with its exit code and what it printed."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from fourfold.cli import output
from fourfold.cli.main import main


@dataclass(frozen=True)
class Outcome:
    """How one run of the command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def fourfold(monkeypatch, capsys) -> Callable[..., Outcome]:
    """Run ``fourfold`` with these words."""

    def run(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["fourfold", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setattr(
            output.stdout, "width", 120
        )  # it may have been made before, by another room's test
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run

"""The time left of a stage: from what was done since its clock began, on a terminal and in a log."""

import time

import pytest
from rich.console import Console

from fourfold.cli import stages as module
from fourfold.cli.stages import stages


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def at(seconds):
        now[0] = 1000.0 + seconds

    return at


def test_in_a_log_a_line_a_minute_tells_the_time_left(clock, capsys):
    with stages() as display:
        display.learned("training for distill", 0, 9)
        display.layers(50, 60, "model.layers.50")
        clock(100)  # what was finished before has gone by: the clock begins anew
        display.layers(50, 60, "model.layers.50")
        clock(120)
        display.layers(51, 60, "model.layers.50")
        clock(140)
        display.layers(52, 60, "model.layers.51")
        clock(400)
        display.layers(53, 60, "model.layers.52")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "calibrating: 50 of 60 (model.layers.50)",
        "calibrating: 53 of 60 (model.layers.52), about 11.7 min left",
    ]


def test_a_terminal_shows_it_beside_the_bar(clock, monkeypatch):
    console = Console(force_terminal=True, width=120, record=True)
    monkeypatch.setattr(module, "stderr", console)
    with stages() as display:
        display.layers(0, 8, "model.layers.0")
        clock(10)
        display.layers(1, 8, "model.layers.0")
        display.bars.refresh()
    shown = console.export_text()
    assert "calibrating model.layers.0" in shown and "1/8" in shown and "about 70.0 s left" in shown

"""Imports without searches for garbage leave the collector as it was, and nothing of a caller's frozen."""

import gc
import os
import subprocess
import sys

import pytest

from fourfold.core.imports import importing

PROGRAM = """
import atexit, gc
from fourfold.core.imports import importing
class Told:
    def __init__(self): self.itself = self
    def __del__(self): print("found")
with importing(): pass
{change}
kept = Told()
"""


class Kept:
    """Something that refers to itself, which only a search finds when it is garbage."""

    def __init__(self):
        self.itself = self


@pytest.fixture
def collector():
    """The collector as it is in a new process; afterwards as it was."""
    enabled, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.enable()
    gc.unfreeze()
    yield
    (gc.freeze if frozen else gc.unfreeze)()
    (gc.enable if enabled else gc.disable)()


def test_nothing_is_searched_meanwhile_and_nothing_stays_frozen(collector):
    with importing():
        assert not gc.isenabled()
        held = [Kept() for _ in range(10)]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    oldest = {id(thing) for thing in gc.get_objects(generation=2)}
    assert all(id(thing) in oldest for thing in held)


def test_where_objects_are_frozen_so_are_the_imported(collector):
    gc.freeze()
    frozen = gc.get_freeze_count()
    with importing():
        held = [Kept() for _ in range(10)]
    assert gc.get_freeze_count() >= frozen + len(held)


def test_a_collector_that_was_off_stays_off_even_after_an_error(collector):
    gc.disable()
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert not gc.isenabled()


@pytest.mark.parametrize(("change", "told"), [("", ""), ("atexit.unregister(gc.freeze)", "found\n")])
def test_a_process_ends_without_a_search(change, told):
    program = PROGRAM.format(change=change)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == told


@pytest.mark.parametrize(("verb", "spins"), [("quantize", "3000"), ("generate", "20000")])
def test_threads_wait_as_fits_the_verb_and_as_the_user_says(fourfold, monkeypatch, verb, spins):
    for name in ("GOMP_SPINCOUNT", "OPENBLAS_THREAD_TIMEOUT"):
        monkeypatch.setenv(name, "")  # so that what the command sets is taken back
        monkeypatch.delenv(name)
    assert fourfold(verb, "--help").code == 0
    assert (os.environ["GOMP_SPINCOUNT"], os.environ["OPENBLAS_THREAD_TIMEOUT"]) == (spins, "4")
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert fourfold(verb, "--help").code == 0
    assert os.environ["GOMP_SPINCOUNT"] == "7"

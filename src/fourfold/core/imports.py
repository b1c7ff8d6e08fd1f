"""Importing torch, transformers or an engine, as fast as it goes, with threads that wait as fits the work."""

import atexit
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

SPINS = 20_000
SPINS_BETWEEN_SMALL_PARTS = 3_000


def patience(spins: int) -> None:
    """How long threads without work look for some, where the user has not said: read by libraries when they
    are imported, so to be called before.

    Torch's (libgomp) spin so many times after each part of its work. Unless told, they spin for long on a
    core that our own threads need. The parts of calibration are small, with work of one thread between them,
    through much of which 20,000 last. OpenBLAS, once in numpy and once in scipy, starts threads that wait
    2^26 clock ticks for work which never comes, 0.1 s of processor time each; 2^4 is its least.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", str(spins))
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")


@contextmanager
def importing() -> Iterator[None]:
    """No search for garbage among imported objects, which all stay: not while they are imported, and not when
    the process ends. They join the oldest generation, or in a process that has frozen objects (the command
    line's, a server) those.

    torch and transformers make 400,000. Of 7 s of processor time for a calibrated run of two small layers,
    0.5 s went into such searches meanwhile, and 0.8 s into those at the end, as memory goes back anyway.
    """
    enabled, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.disable()
    atexit.register(gc.freeze)
    try:
        yield
    finally:
        gc.freeze()
        if not frozen:
            gc.unfreeze()
        if enabled:
            gc.enable()

"""Importing torch, transformers or an engine, as fast as it goes."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


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

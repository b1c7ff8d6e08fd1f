"""Running programs that nobody has read: each in a process of its own that may do next to nothing."""

from fourfold.evaluate.sandbox.sandbox import (
    DEFAULT_LIMITS,
    WALLS,
    Limits,
    Verdict,
    describe,
    probe,
    run_program,
)

__all__ = ["DEFAULT_LIMITS", "WALLS", "Limits", "Verdict", "describe", "probe", "run_program"]

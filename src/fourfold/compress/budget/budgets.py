"""What a user may ask for: ``4.5bits``, ``1.2GB`` or ``kl=0.05``."""

import re
from dataclasses import dataclass
from typing import Literal

from fourfold.core.errors import UsageError

NUMBER = r"(\d+(?:\.\d*)?(?:e-?\d+)?|\.\d+)"
SIZES = {
    f"{prefix}{base}": step**power
    for base, step in (("b", 1000), ("ib", 1024))
    for power, prefix in enumerate(["", "k", "m", "g", "t"])
    if prefix or base == "b"
}


@dataclass(frozen=True)
class Budget:
    """``value`` is the mean bits of a weight that is rounded, scales included; the bytes of all
    tensors; or the largest predicted KL in nats a token.
    """

    kind: Literal["bits", "bytes", "kl"]
    value: float
    text: str


def parse_budget(text: str) -> Budget:
    """``text`` understood. Raises UsageError for anything else, zero among it."""
    asked = text.replace(" ", "").lower()
    found: Budget | None = None
    if match := re.fullmatch(f"{NUMBER}bits?", asked):
        found = Budget("bits", float(match[1]), text)
    elif match := re.fullmatch(f"kl={NUMBER}", asked):
        found = Budget("kl", float(match[1]), text)
    elif (match := re.fullmatch(f"{NUMBER}([a-z]+)", asked)) and match[2] in SIZES:
        found = Budget("bytes", float(match[1]) * SIZES[match[2]], text)
    if found is None or not 0 < found.value < float("inf"):
        raise UsageError(
            f"The budget '{text}' is not understood. Give the mean bits of a rounded weight, scales included "
            "(4.5bits), the size of all tensors (1.2GB, 800MiB), or the largest predicted KL from "
            "the original in nats a token (kl=0.05)."
        )
    return found

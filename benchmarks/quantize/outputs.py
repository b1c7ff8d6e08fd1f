"""Reading the outputs back without torch, to see whether they hold the same numbers.

A quantized layer is two U8 tensors: codes (``weight_packed`` in compressed-tensors, ``weight`` in Quark) and
E8M0 scales (``weight_scale``). A code of -0 means 0, and writers differ in which they store, so -0 is made 0
before comparing; everything else must be equal byte for byte.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

MINUS_ZERO = 8


def tensors(folder: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """``(name, dtype, bytes)`` of every tensor of a safetensors folder, one at a time."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                file.seek(8 + length + begin)
                yield name, entry["dtype"], np.frombuffer(file.read(end - begin), np.uint8)


def read(folder: Path) -> dict[str, np.ndarray]:
    """Canonical bytes by logical part: ``module:codes``, ``module:scales``, or the name of a kept tensor."""
    parts: dict[str, np.ndarray] = {}
    for name, dtype, data in tensors(folder):
        module, _, suffix = name.rpartition(".")
        if suffix == "weight_packed" or (suffix == "weight" and dtype == "U8"):
            parts[f"{module}:codes"] = without_minus_zero(data)
        elif suffix == "weight_scale":
            parts[f"{module}:scales"] = data
        else:
            parts[name] = data
    return parts


def without_minus_zero(codes: np.ndarray) -> np.ndarray:
    """Two 4-bit codes a byte, with -0 as 0."""
    low, high = codes & 15, codes >> 4
    low = np.where(low == MINUS_ZERO, 0, low)
    high = np.where(high == MINUS_ZERO, 0, high)
    return (low | (high << 4)).astype(np.uint8)


def differences(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[str]:
    """Parts that only one of the two has, or that are not equal."""
    return sorted(
        name
        for name in a.keys() | b.keys()
        if name not in a or name not in b or not np.array_equal(a[name], b[name])
    )

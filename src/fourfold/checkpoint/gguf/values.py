"""An architecture's part of a GGUF file's metadata, each value checked when it is taken."""

import math
from pathlib import Path
from typing import Any

from fourfold.checkpoint.storage.header import short
from fourfold.core.errors import FourfoldError

START_AGAIN = "Start from the model's Hugging Face folder instead."


class Values:
    """Values under their keys without ``architecture`` and its dot."""

    def __init__(self, path: Path, architecture: str, metadata: dict[str, Any]):
        self.path, self._prefix = path, architecture + "."
        self._values = {
            key.removeprefix(self._prefix): value
            for key, value in metadata.items()
            if key.startswith(self._prefix)
        }

    def get(self, key: str, default: Any = None) -> Any:
        """The value, whatever it is."""
        return self._values.get(key, default)

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1. Raises FourfoldError for anything else."""
        value = self.get(key, default)
        # bool is an int in Python
        if type(value) is not int or value < 1:
            raise self.unusable(key, value)
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above 0. Raises FourfoldError for anything else."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.unusable(key, value)
        return float(value)

    def unusable(self, key: str, value: object) -> FourfoldError:
        """The error for a value that no model has."""
        return FourfoldError(
            f"{self.path} has no usable '{self._prefix}{key}' in its metadata: {short(repr(value))}. It is "
            f"damaged, or of a kind that Fourfold does not read. {START_AGAIN}"
        )

    def inexpressible(self, key: str, what: str) -> FourfoldError:
        """The error for what could only be guessed at; ``what`` is said of the file."""
        return FourfoldError(f"{self.path} {what} ({self._prefix}{key}). {START_AGAIN}")

"""``fourfold.json``: how a checkpoint came to be, and the hash of every file in it."""

from pathlib import Path
from typing import Any, Literal

from fourfold.core.records import ModelCard, Record

MANIFEST_NAME = "fourfold.json"


class Manifest(Record):
    """Written last into every checkpoint that Fourfold makes; ``fourfold verify`` checks against it.

    ``calibration`` says which tokens calibrated passes saw: source, samples, sequence_tokens, seed, sha256,
    and of experts ``expert_tokens``: how many the router sent to each, and ``starved_experts``: which saw too
    few, even with those that it did not send them.
    """

    kind: Literal["fourfold.checkpoint/1"] = "fourfold.checkpoint/1"
    fourfold_version: str
    source: str
    dialect: str
    recipe: dict[str, Any] | None
    calibration: dict[str, Any] | None = None
    fingerprint: dict[str, str]
    card: ModelCard
    sha256: dict[str, str]


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of ``folder``, or None when Fourfold did not write it."""
    path = folder / MANIFEST_NAME
    return Manifest.model_validate_json(path.read_text()) if path.is_file() else None

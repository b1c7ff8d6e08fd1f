"""Fixtures of this room: the peers' golden files, and a quantized tiny model."""

from pathlib import Path

import pytest
from checkpoint_helpers import projections, quantize_folder

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The peers' files, made by goldens/make_goldens.py."""
    return GOLDENS


@pytest.fixture(scope="session")
def mxfp4_folder(tmp_path_factory, tiny_llama) -> Path:
    """The tiny Llama in MXFP4, compressed-tensors."""
    out = tmp_path_factory.mktemp("quantized") / "mxfp4"
    return quantize_folder(tiny_llama, out, "compressed-tensors", projections())

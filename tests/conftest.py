"""Shared fixtures: the tiny models most tests stand on."""

from pathlib import Path

import pytest
from tiny_models import build_tiny_model


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """A two-layer random Llama in a folder, as a user would have it."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory) -> Path:
    """A two-layer random Qwen3 with tied embeddings."""
    return build_tiny_model(
        tmp_path_factory.mktemp("models") / "tiny-qwen3", "qwen3", seed=1, tie_word_embeddings=True
    )

"""Synthetic prompts: token ids drawn at random from a range that every vocabulary has.

No two prompts of a run, a profile or a concurrency are alike, so neither prefix caches nor answers computed
earlier help; the same seed gives the same prompts. Measuring twice with one seed against a server that kept
its cache would measure the cache: change ``--seed``, or restart the server.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np

from fourfold.core.errors import UsageError


@dataclass(frozen=True)
class TokenRange:
    """Ids ``low`` to ``high - 1`` are drawn; ``source`` says how the range was learnt."""

    low: int
    high: int
    source: str


UNKNOWN_VOCABULARY = TokenRange(100, 1000, "ids 100 to 999, as the server does not tell its vocabulary")


def range_within(vocabulary: int, source: str) -> TokenRange:
    """The middle of a vocabulary: special tokens sit at its ends (Llama 2 and SmolLM low, Llama 3 and Qwen
    high).

    Raises UsageError for a vocabulary of fewer than 16 tokens.
    """
    if vocabulary < 16:
        raise UsageError(f"A vocabulary of {vocabulary} tokens ({source}) is too small to draw prompts from.")
    return TokenRange(min(1000, vocabulary // 4), vocabulary * 9 // 10, source)


def range_of_tokenizer(path: Path) -> TokenRange:
    """The range for ``tokenizer.json`` in a folder, or that file itself. Raises UsageError when
    unreadable."""
    from tokenizers import Tokenizer

    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise UsageError(f"--tokenizer {path}: no tokenizer.json could be read there ({error}).") from error
    return range_within(tokenizer.get_vocab_size(), f"the vocabulary of {file.name}")


def range_of_folder(folder: Path) -> TokenRange | None:
    """The range for the ``vocab_size`` in a model folder's config.json, or None when it has none."""
    config = folder / "config.json"
    try:
        values = json.loads(config.read_text()) if config.is_file() else {}
    except ValueError:
        return None  # serving the folder will say what is wrong with it
    size = values.get("vocab_size") or values.get("text_config", {}).get("vocab_size")
    return range_within(size, "vocab_size in config.json") if isinstance(size, int) else None


def make_prompt(tokens: TokenRange, length: int, *key: int | str) -> list[int]:
    """``length`` ids; ``key`` (seed, profile, concurrency, index ...) decides which."""
    numbers = [crc32(part.encode()) if isinstance(part, str) else part for part in key]
    return np.random.default_rng(numbers).integers(tokens.low, tokens.high, length).tolist()

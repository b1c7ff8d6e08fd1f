"""The token sequences that calibration runs, and where they came from.

They come from a text (:mod:`calibration_data`), or the model writes them itself: tokens sampled from a model
are close to what it was trained on, and ask for no data at all (LLM-QAT, arXiv:2305.17888, section 3.1). That
takes long, so they are written in pieces, each durable before the next begins.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fourfold.core.errors import UsageError

SAMPLES = 512
SEQUENCE_TOKENS = 512
SHORTEST_SEQUENCE = 8
SELF_WRITTEN = "written by the model itself"


@dataclass(frozen=True)
class CalibrationSet:
    """``token_ids`` int64 [n, T]: n sequences of T tokens each. ``source`` says where they came from."""

    token_ids: torch.Tensor
    source: str
    seed: int

    @property
    def sha256(self) -> str:
        """Hash of the tokens themselves."""
        return hashlib.sha256(self.token_ids.contiguous().numpy().tobytes()).hexdigest()

    def batches(self, tokens_per_batch: int) -> list[torch.Tensor]:
        """The sequences in order, [B, T] each, with about ``tokens_per_batch`` tokens."""
        return list(self.token_ids.split(max(1, tokens_per_batch // self.token_ids.shape[1])))

    @property
    def fingerprint(self) -> dict[str, str]:
        """What a resumed run must bring again; the source counts by its tokens, wherever it lies."""
        samples, length = self.token_ids.shape
        return {**_shape_fields(samples, length, self.seed), "calibration_sha256": self.sha256[:16]}

    def record(self) -> dict[str, Any]:
        """What the checkpoint says of it."""
        samples, length = self.token_ids.shape
        return {
            "source": self.source,
            "samples": samples,
            "sequence_tokens": length,
            "seed": self.seed,
            "sha256": self.sha256,
        }


@dataclass(frozen=True)
class SelfWritten:
    """A calibration set that the model has yet to write.

    ``write(first, count)`` gives int64 [count, T]: the sequences from number ``first`` on, always the same
    for the same seed.
    """

    samples: int
    sequence_tokens: int
    seed: int
    write: Callable[[int, int], torch.Tensor]

    @property
    def fingerprint(self) -> dict[str, str]:
        """What a resumed run must bring again; the tokens follow from it and from the source."""
        fields = _shape_fields(self.samples, self.sequence_tokens, self.seed)
        return {**fields, "calibration_sha256": SELF_WRITTEN}


Calibration = CalibrationSet | SelfWritten


def _shape_fields(samples: int, sequence_tokens: int, seed: int) -> dict[str, str]:
    return {
        "calibration_samples": str(samples),
        "calibration_seed": str(seed),
        "calibration_sequence_tokens": str(sequence_tokens),
    }


def cut(
    token_ids: torch.Tensor, samples: int, sequence_tokens: int, seed: int, source: str
) -> CalibrationSet:
    """``samples`` sequences at random places of ``token_ids`` [n] that do not overlap, in their order.

    Raises UsageError when there are too few tokens.
    """
    needed = samples * sequence_tokens
    if len(token_ids) < needed:
        raise UsageError(
            f"The calibration text {source} has {len(token_ids)} tokens, but {samples} sequences of "
            f"{sequence_tokens} need {needed}. Give a longer text{_less(len(token_ids), sequence_tokens)}."
        )
    generator = torch.Generator().manual_seed(seed)
    spare = torch.randint(0, len(token_ids) - needed + 1, (samples,), generator=generator).sort().values
    starts = spare + torch.arange(samples) * sequence_tokens
    rows = token_ids[starts[:, None] + torch.arange(sequence_tokens)]
    return CalibrationSet(rows.to(torch.int64), source, seed)


def _less(tokens: int, sequence_tokens: int) -> str:
    """What to ask for where a text has so few tokens, if that is anything to calibrate on."""
    if tokens >= sequence_tokens:
        return f", or ask for less: --samples {tokens // sequence_tokens}"
    if tokens >= SHORTEST_SEQUENCE:
        return f", or ask for less: --samples 1 --sequence-tokens {tokens}"
    return ""

"""The token sequences that calibration runs, and where they came from."""

import hashlib
from dataclasses import dataclass

import torch


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

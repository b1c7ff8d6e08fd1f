"""What one window says of a model, and of a model beside its base: sums over its predicted tokens.

Loss is -log p(token). KL(base || model) = sum_v p_base(v) (log p_base(v) - log p_model(v)), in nats, over the
whole vocabulary. Logits are read as float32 and normalised in float32, a few rows at a time, so that memory
beyond the logits themselves stays at some megabytes; sums over tokens are float64.
"""

from dataclasses import dataclass

import numpy as np
import torch

from fourfold.core.errors import FourfoldError
from fourfold.core.protocols import LanguageModel

ROWS_AT_A_TIME = 8  # some megabytes at a time stay in the cache: twice as fast as 64


@dataclass(frozen=True)
class WindowScore:
    """Sums over the ``tokens`` predicted in one window. Without a base the last three are zero."""

    tokens: int
    loss: float
    loss_base: float = 0.0
    divergence: float = 0.0
    agreed: int = 0


def score_window(token_ids: list[int], model: LanguageModel, base: LanguageModel | None) -> WindowScore:
    """Score every token of the window but its first. Raises FourfoldError for logits that are not finite."""
    targets = torch.tensor(token_ids[1:])
    logits = checked_logits(model, token_ids)
    logits_base = None if base is None else checked_logits(base, token_ids)
    if logits_base is not None and logits_base.shape != logits.shape:
        raise FourfoldError(
            f"'{model.card.name}' has {logits.shape[1]} logits and its base {logits_base.shape[1]}: "
            "their vocabularies differ. Compare with the model that it was made from."
        )
    parts = [
        _score_rows(targets[rows], logits[rows], None if logits_base is None else logits_base[rows])
        for start in range(0, len(targets), ROWS_AT_A_TIME)
        for rows in [slice(start, min(start + ROWS_AT_A_TIME, len(targets)))]
    ]
    return WindowScore(len(targets), *(sum(column) for column in zip(*parts, strict=True)))


def checked_logits(model: LanguageModel, token_ids: list[int]) -> torch.Tensor:
    """Float32 logits [T, V] of a window, or an error that names the first row which is not finite."""
    logits = torch.from_numpy(np.asarray(model.logits(token_ids), dtype=np.float32))
    # a row's sum is finite only if all of it is; the slow look is for the rare row whose sum is not
    if not bool(torch.isfinite(logits.sum(dim=-1)).all()) and not bool(torch.isfinite(logits).all()):
        row = int((~torch.isfinite(logits).all(dim=-1)).nonzero()[0])
        raise FourfoldError(
            f"'{model.card.name}' gives logits that are not finite (NaN or infinite) at token {row} of a "
            "window. Its weights or scales are damaged: run `fourfold verify` on the folder, or remake it."
        )
    return logits


def _score_rows(
    targets: torch.Tensor, logits: torch.Tensor, logits_base: torch.Tensor | None
) -> tuple[float, float, float, int]:
    """Loss, base loss, divergence and agreement, summed over some rows."""
    log_p = torch.log_softmax(logits, dim=-1)
    loss = _loss(log_p, targets)
    if logits_base is None:
        return loss, 0.0, 0.0, 0
    log_base = torch.log_softmax(logits_base, dim=-1)
    divergence = (log_base.exp() * (log_base - log_p)).sum(dim=-1).double().sum()
    agreed = (logits.argmax(dim=-1) == logits_base.argmax(dim=-1)).sum()
    return loss, _loss(log_base, targets), float(divergence), int(agreed)


def _loss(log_p: torch.Tensor, targets: torch.Tensor) -> float:
    return float(-log_p.gather(1, targets[:, None]).double().sum())

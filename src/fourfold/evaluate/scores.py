"""What one window says of a model, and of a model beside its base, token by token.

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
class TokenScores:
    """Of each predicted token of a window, float64 [tokens]. Without a base the last three are zero."""

    loss: np.ndarray
    loss_base: np.ndarray
    divergence: np.ndarray
    agreed: np.ndarray


def score_window(token_ids: list[int], model: LanguageModel, base: LanguageModel | None) -> TokenScores:
    """Score every token of the window but its first. Raises FourfoldError for logits that are not finite."""
    logits = checked_logits(model, token_ids)
    return score_logits(token_ids, logits, None if base is None else checked_logits(base, token_ids), model)


def score_logits(
    token_ids: list[int], logits: torch.Tensor, logits_base: torch.Tensor | None, model: LanguageModel
) -> TokenScores:
    """Score logits [T, V] of a window of T tokens, and those of the base where there are any."""
    targets = torch.tensor(token_ids[1:])
    if logits_base is not None and logits_base.shape != logits.shape:
        raise FourfoldError(
            f"'{model.card.name}' has {logits.shape[1]} logits and its base {logits_base.shape[1]}: "
            "their vocabularies differ. Compare with the model that it was made from."
        )
    parts = [
        _score_rows(targets[rows], logits[rows], None if logits_base is None else logits_base[rows])
        for rows in _slices(len(targets))
    ]
    return TokenScores(*(torch.cat(column).numpy() for column in zip(*parts, strict=True)))


def token_losses(token_ids: list[int], model: LanguageModel) -> np.ndarray:
    """Loss of every token but the first, float64 [T - 1]; the logits are gone when this returns."""
    targets, logits = torch.tensor(token_ids[1:]), checked_logits(model, token_ids)
    parts = [_loss(torch.log_softmax(logits[rows], -1), targets[rows]) for rows in _slices(len(targets))]
    return torch.cat(parts).numpy()


def checked_logits(model: LanguageModel, token_ids: list[int]) -> torch.Tensor:
    """Float32 logits [T, V] of a window, or an error that names the first row which is not finite."""
    return check_finite(model.logits(token_ids), model.card.name)


def check_finite(values: np.ndarray, name: str) -> torch.Tensor:
    """``values`` [T, V] as a float32 tensor. Raises FourfoldError naming the first row that is not finite."""
    logits = torch.from_numpy(np.asarray(values, dtype=np.float32))
    # a row's sum is finite only if all of it is; the slow look is for the rare row whose sum is not
    if not bool(torch.isfinite(logits.sum(dim=-1)).all()) and not bool(torch.isfinite(logits).all()):
        row = int((~torch.isfinite(logits).all(dim=-1)).nonzero()[0])
        raise FourfoldError(
            f"'{name}' gives logits that are not finite (NaN or infinite) at token {row} of a "
            "window. Its weights or scales are damaged: run `fourfold verify` on the folder, or remake it."
        )
    return logits


def _slices(rows: int) -> list[slice]:
    return [slice(i, min(i + ROWS_AT_A_TIME, rows)) for i in range(0, rows, ROWS_AT_A_TIME)]


def _score_rows(
    targets: torch.Tensor, logits: torch.Tensor, logits_base: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, base loss, divergence and agreement of some rows."""
    log_p = torch.log_softmax(logits, dim=-1)
    loss = _loss(log_p, targets)
    if logits_base is None:
        return loss, torch.zeros_like(loss), torch.zeros_like(loss), torch.zeros_like(loss)
    log_base = torch.log_softmax(logits_base, dim=-1)
    divergence = (log_base.exp() * (log_base - log_p)).sum(dim=-1).double()
    agreed = (logits.argmax(dim=-1) == logits_base.argmax(dim=-1)).double()
    return loss, _loss(log_base, targets), divergence, agreed


def _loss(log_p: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -log_p.gather(1, targets[:, None]).squeeze(1).double()

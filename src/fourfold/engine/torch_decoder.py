"""A decoder computed by torch, an operation after the other: what a C++ program has no words for."""

import numpy as np
import torch
from torch import Tensor

from fourfold.engine.attention import DenseAttention, PagedAttention
from fourfold.engine.decoder import Decoder
from fourfold.engine.kv_cache import KVCache
from fourfold.engine.kv_format import KVFormat
from fourfold.engine.scheduler import Chunk

HEAD_ROWS = 128  # of a whole sequence whose logits are computed at a time


class TorchDecoder:
    """Does what NativeDecoder does; ``obstacle`` says why it is needed."""

    def __init__(self, model: Decoder, form: KVFormat, obstacle: str):
        self.model, self.form, self.arithmetic = model, form, f"torch: {obstacle}"

    @torch.inference_mode()
    def step(self, cache: KVCache, chunks: list[Chunk], chosen: list[int]) -> tuple[Tensor, None]:
        """Run a step over ``cache``: logits [n, V] of the ``chosen`` rows, their largest still to find."""
        token_ids = [t for c in chunks for t in c.token_ids]
        hidden = self.model.hidden(torch.tensor(token_ids), PagedAttention(cache, chunks))
        if not chosen:
            return hidden[:0], None
        return self.model.logits(hidden if len(chosen) == len(hidden) else hidden[chosen]), None

    @torch.inference_mode()
    def embedded(self, token_ids: list[int]) -> np.ndarray:
        """States [T, H] before the first layer."""
        return self.model.embed(torch.tensor(token_ids)).numpy()

    @torch.inference_mode()
    def through(self, hidden: np.ndarray, first: int, end: int) -> np.ndarray:
        """States [T, H] of a whole sequence from before layer ``first`` to before layer ``end``."""
        return self.model.through(torch.tensor(hidden), self._attention(len(hidden)), first, end).numpy()

    @torch.inference_mode()
    def logits_of(self, hidden: np.ndarray) -> np.ndarray:
        """Logits [T, V] of states [T, H] that have passed every layer."""
        return self.model.logits(torch.from_numpy(hidden)).float().numpy()

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> np.ndarray:
        """Logits [T, V] of a whole sequence, beside any cache."""
        hidden = self.model.hidden(torch.tensor(token_ids), self._attention(len(token_ids)))
        result = np.empty((len(token_ids), self.model.shape.vocabulary), dtype=np.float32)
        for start in range(0, len(token_ids), HEAD_ROWS):
            rows = slice(start, start + HEAD_ROWS)
            torch.from_numpy(result[rows]).copy_(self.model.logits(hidden[rows]))
        return result

    def _attention(self, tokens: int) -> DenseAttention:
        return DenseAttention(tokens, self.model.shape.kv_heads, self.form)

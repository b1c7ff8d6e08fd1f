"""Causal attention over a step's tokens: paged for serving, dense for a whole sequence at once.

A model's layer hands over rows [T, q_heads + 2 * kv_heads, D] and gets back [T, q_heads * D]. All decoding
sequences are one attention call: their blocks are gathered into one padded batch, and the query heads that
share a key head stand as its query rows. The price is a copy of the keys and values read, padded to the
longest sequence of the batch.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.engine.kv_cache import KVCache
from fourfold.engine.kv_format import KVFormat
from fourfold.engine.scheduler import Chunk

NEVER = float("-inf")


class Attention(Protocol):
    """What a model needs of a step: where its tokens stand, and attention for each layer."""

    positions: Tensor

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """Attention of ``layer`` for rotated qkv [T, q_heads + 2 * kv_heads, D] -> [T, q_heads * D]."""
        ...


class DenseAttention:
    """One whole sequence of T tokens, nothing cached; keys and values still pass through the KV format."""

    def __init__(self, tokens: int, kv_heads: int, form: KVFormat):
        self.positions = torch.arange(tokens)
        self.kv_heads, self.form = kv_heads, form

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """Attention of every token to itself and all before it."""
        kv = self.form.decode(layer, self.form.encode(layer, qkv[:, -2 * self.kv_heads :]))
        queries = self.form.turn(qkv[:, : -2 * self.kv_heads])
        return self.form.turn(attend(queries, kv, None))


class PagedAttention:
    """The chunks of one step, decodes first, over the paged cache. Masks and tables are made once a step."""

    def __init__(self, cache: KVCache, chunks: list[Chunk]):
        self.cache = cache
        self.decodes = next((i for i, chunk in enumerate(chunks) if chunk.count > 1), len(chunks))
        positions = [p for c in chunks for p in range(c.start, c.start + c.count)]
        self.positions = torch.tensor(positions)
        self.slots = self._slots(chunks)
        self.table, self.mask = self._decode_batch(chunks[: self.decodes])
        self.prefills = [self._prefill(chunk) for chunk in chunks[self.decodes :]]

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """Write this step's keys and values, then attend: decodes as one batch, then each prefill."""
        kv_heads = self.cache.heads
        queries = self.cache.form.turn(qkv[:, : -2 * kv_heads])
        self.cache.write(layer, self.slots, qkv[:, -2 * kv_heads :])
        parts = [self._decode(layer, queries[: self.decodes])] if self.decodes else []
        row = self.decodes
        for count, blocks, length, mask in self.prefills:
            kv = self.cache.read(layer, blocks, 1)[0, :length]
            parts.append(attend(queries[row : row + count], kv, mask))
            row += count
        return self.cache.form.turn(parts[0] if len(parts) == 1 else torch.cat(parts))

    def _slots(self, chunks: list[Chunk]) -> Tensor:
        size = self.cache.block_size
        return torch.tensor(
            [
                c.sequence.table.blocks[p // size] * size + p % size
                for c in chunks
                for p in range(c.start, c.start + c.count)
            ]
        )

    def _decode_batch(self, chunks: list[Chunk]) -> tuple[Tensor, Tensor]:
        """Padded block table [B * n] and additive mask [B, 1, 1, n * block_size]."""
        size = self.cache.block_size
        used = [chunk.start // size + 1 for chunk in chunks]
        width = max(used, default=0)
        rows = [c.sequence.table.blocks[:n] + [0] * (width - n) for c, n in zip(chunks, used, strict=True)]
        last = torch.tensor([chunk.start for chunk in chunks]).view(-1, 1, 1, 1)
        unseen = torch.arange(width * size).view(1, 1, 1, -1) > last
        mask = torch.zeros(unseen.shape, dtype=self.cache.form.dtype).masked_fill_(unseen, NEVER)
        return torch.tensor(rows, dtype=torch.long).view(-1), mask

    def _decode(self, layer: int, queries: Tensor) -> Tensor:
        batch, _, width = queries.shape
        heads = self.cache.heads
        kv = self.cache.read(layer, self.table, batch).transpose(1, 2)
        grouped = queries.reshape(batch, heads, -1, width)
        out = F.scaled_dot_product_attention(grouped, kv[:, :heads], kv[:, heads:], attn_mask=self.mask)
        return out.reshape(batch, -1)

    def _prefill(self, chunk: Chunk) -> tuple[int, Tensor, int, Tensor | None]:
        """(tokens, blocks to read, tokens to read, mask or None when plainly causal) of one chunk."""
        length = chunk.start + chunk.count
        blocks = torch.tensor(chunk.sequence.table.blocks[: -(-length // self.cache.block_size)])
        if chunk.start == 0:
            return chunk.count, blocks, length, None
        unseen = torch.ones(chunk.count, length, dtype=torch.bool).triu_(chunk.start + 1)
        mask = torch.zeros(unseen.shape, dtype=self.cache.form.dtype).masked_fill_(unseen, NEVER)
        return chunk.count, blocks, length, mask


def attend(queries: Tensor, kv: Tensor, mask: Tensor | None) -> Tensor:
    """One sequence: queries [n, q_heads, D], kv [m, 2 * kv_heads, D] -> [n, q_heads * D]; no mask: causal."""
    heads = kv.shape[1] // 2
    q, kv = queries.transpose(0, 1).unsqueeze(0), kv.transpose(0, 1).unsqueeze(0)
    out = F.scaled_dot_product_attention(
        q, kv[:, :heads], kv[:, heads:], attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return out.squeeze(0).transpose(0, 1).reshape(queries.shape[0], -1)

"""Causal attention over a step's tokens: paged for serving, dense for a whole sequence at once.

A model's layer hands over rows [T, q_heads + 2 * kv_heads, D] and gets back [T, q_heads * D]. All decoding
sequences are one attention call: their blocks are gathered into one padded batch, and the query heads that
share a key head stand as its query rows. The price is a copy of the keys and values read, padded to the
longest sequence of the batch. A layer with a window reads only the blocks that its window reaches.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.engine.kv_cache import KVCache
from fourfold.engine.kv_format import KVFormat
from fourfold.engine.scheduler import Chunk

NEVER = float("-inf")
SLICE_SCORES = 1 << 22  # scores that are held at once where they are not fused away


@dataclass(frozen=True, slots=True, eq=False)
class Scoring:
    """How a layer weighs what its queries see: softmax over the keys of cap(``scale`` q k).

    A query sees itself and the ``window`` - 1 tokens before it, None: all. cap(s) = c tanh(s / c) for
    ``softcap`` c. ``sinks``, float32 [q_heads], are one more score for each head, of a key that has no value.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether torch's fused attention can say it."""
        return self.softcap is None and self.sinks is None


class Attention(Protocol):
    """What a model needs of a step: where its tokens stand, and attention for each layer."""

    positions: Tensor

    def __call__(self, layer: int, qkv: Tensor, scoring: Scoring) -> Tensor:
        """Attention of ``layer`` for rotated qkv [T, q_heads + 2 * kv_heads, D] -> [T, q_heads * D]."""
        ...


class DenseAttention:
    """One whole sequence of T tokens, nothing cached; keys and values still pass through the KV format."""

    def __init__(self, tokens: int, kv_heads: int, form: KVFormat):
        self.positions = torch.arange(tokens)
        self.kv_heads, self.form = kv_heads, form

    def __call__(self, layer: int, qkv: Tensor, scoring: Scoring) -> Tensor:
        """Attention of every token to itself and those before it."""
        kv = self.form.decode(layer, self.form.encode(layer, qkv[:, -2 * self.kv_heads :]))
        queries = self.form.turn(qkv[:, : -2 * self.kv_heads])
        tokens, heads, _ = queries.shape
        if scoring.plain and (scoring.window or tokens) >= tokens:
            return self.form.turn(attend(queries, kv, None, scoring))
        parts = []
        step = max(1, SLICE_SCORES // (heads * tokens))
        for start in range(0, tokens, step):
            end = min(start + step, tokens)
            first = first_seen(start, scoring.window)
            mask = additive(
                torch.arange(start, end)[:, None] - torch.arange(first, end), scoring, self.form.dtype
            )
            parts.append(attend(queries[start:end], kv[first:end], mask, scoring))
        return self.form.turn(torch.cat(parts))


@dataclass(frozen=True, slots=True)
class Prefill:
    """What one chunk of ``count`` queries reads: the first ``length`` tokens of ``blocks``.

    No ``mask``: plainly causal.
    """

    count: int
    blocks: Tensor
    length: int
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class View:
    """What the layers of one window read in a step: a padded block table [B * n] and an additive mask
    [B, 1, 1, n * block_size] for the decodes, and each prefill's own.
    """

    table: Tensor
    mask: Tensor
    prefills: list[Prefill]


class PagedAttention:
    """The chunks of one step, decodes first, over the paged cache. Masks and tables are made once a step."""

    def __init__(self, cache: KVCache, chunks: list[Chunk]):
        self.cache, self.chunks = cache, chunks
        self.decodes = next((i for i, chunk in enumerate(chunks) if chunk.count > 1), len(chunks))
        positions = [p for c in chunks for p in range(c.start, c.start + c.count)]
        self.positions = torch.tensor(positions)
        self.slots = self._slots(chunks)
        self._views: dict[int | None, View] = {}

    def __call__(self, layer: int, qkv: Tensor, scoring: Scoring) -> Tensor:
        """Write this step's keys and values, then attend: decodes as one batch, then each prefill."""
        kv_heads = self.cache.heads
        queries = self.cache.form.turn(qkv[:, : -2 * kv_heads])
        self.cache.write(layer, self.slots, qkv[:, -2 * kv_heads :])
        view = self._views.get(scoring.window)
        if view is None:
            view = self._views[scoring.window] = self._view(scoring)
        parts = [self._decode(layer, queries[: self.decodes], view, scoring)] if self.decodes else []
        row = self.decodes
        for chunk in view.prefills:
            kv = self.cache.read(layer, chunk.blocks, 1)[0, : chunk.length]
            parts.append(attend(queries[row : row + chunk.count], kv, chunk.mask, scoring))
            row += chunk.count
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

    def _view(self, scoring: Scoring) -> View:
        table, mask = self._decode_batch(self.chunks[: self.decodes], scoring)
        return View(table, mask, [self._prefill(chunk, scoring) for chunk in self.chunks[self.decodes :]])

    def _decode_batch(self, chunks: list[Chunk], scoring: Scoring) -> tuple[Tensor, Tensor]:
        size = self.cache.block_size
        spans = [(first_seen(c.start, scoring.window) // size, c.start // size + 1) for c in chunks]
        width = max((end - first for first, end in spans), default=0)
        rows = [
            c.sequence.table.blocks[first:end].tolist() + [0] * (width - end + first)
            for c, (first, end) in zip(chunks, spans, strict=True)
        ]
        own = torch.tensor([c.start - first * size for c, (first, _) in zip(chunks, spans, strict=True)])
        distance = own.view(-1, 1, 1, 1) - torch.arange(width * size)
        return torch.tensor(rows, dtype=torch.long).view(-1), additive(
            distance, scoring, self.cache.form.dtype
        )

    def _decode(self, layer: int, queries: Tensor, view: View, scoring: Scoring) -> Tensor:
        batch, _, width = queries.shape
        heads = self.cache.heads
        kv = self.cache.read(layer, view.table, batch).transpose(1, 2)
        grouped = queries.reshape(batch, heads, -1, width)
        keys, values = kv[:, :heads], kv[:, heads:]
        if scoring.plain:
            out = F.scaled_dot_product_attention(
                grouped, keys, values, attn_mask=view.mask, scale=scoring.scale
            )
        else:
            out = weigh(grouped.unsqueeze(3), keys, values, view.mask.unsqueeze(1), scoring)
        return out.reshape(batch, -1)

    def _prefill(self, chunk: Chunk, scoring: Scoring) -> Prefill:
        size, end = self.cache.block_size, chunk.start + chunk.count
        first = first_seen(chunk.start, scoring.window) // size
        blocks = torch.tensor(chunk.sequence.table.blocks[first : -(-end // size)])
        length = end - first * size
        if chunk.start == 0 and scoring.plain and (scoring.window or end) >= end:
            return Prefill(chunk.count, blocks, length, None)
        distance = torch.arange(chunk.start, end)[:, None] - torch.arange(first * size, end)
        return Prefill(chunk.count, blocks, length, additive(distance, scoring, self.cache.form.dtype))


def first_seen(position: int, window: int | None) -> int:
    """The first position that a query at ``position`` sees."""
    return 0 if window is None else max(0, position - window + 1)


def additive(distance: Tensor, scoring: Scoring, dtype: torch.dtype) -> Tensor:
    """0 where a query sees the key that stands ``distance`` before it, minus infinity elsewhere."""
    unseen = distance < 0
    if scoring.window is not None:
        unseen |= distance >= scoring.window
    return torch.zeros(unseen.shape, dtype=dtype).masked_fill_(unseen, NEVER)


def attend(queries: Tensor, kv: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
    """One sequence: queries [n, q_heads, D], kv [m, 2 * kv_heads, D] -> [n, q_heads * D].

    ``mask`` [n, m]; none: causal, where ``scoring`` is plain.
    """
    heads = kv.shape[1] // 2
    q, kv = queries.transpose(0, 1).unsqueeze(0), kv.transpose(0, 1).unsqueeze(0)
    keys, values = kv[:, :heads], kv[:, heads:]
    if scoring.plain:
        out = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=True, scale=scoring.scale
        )
    else:
        assert mask is not None
        grouped = q.unflatten(1, (heads, -1))
        step = max(1, SLICE_SCORES // (queries.shape[1] * len(kv)))
        parts = [
            weigh(part, keys, values, seen, scoring)
            for part, seen in zip(grouped.split(step, 3), mask.split(step), strict=True)
        ]
        out = torch.cat(parts, 3).flatten(1, 2)
    return out.squeeze(0).transpose(0, 1).reshape(queries.shape[0], -1)


def weigh(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scoring: Scoring) -> Tensor:
    """Attention in so many words, float32: q [B, kv_heads, R, n, D] of R heads that share a key head, keys
    and values [B, kv_heads, m, D], ``mask`` such as to fit [B, kv_heads, R, n, m] -> like q.
    """
    scores = (q.flatten(2, 3).float() @ keys.float().mT).mul_(scoring.scale).unflatten(2, q.shape[2:4])
    if scoring.softcap is not None:
        scores = scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
    scores += mask
    if scoring.sinks is None:
        shares = scores.softmax(-1)
    else:
        sinks = scoring.sinks.view(scores.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
        shares = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    return (shares.flatten(2, 3) @ values.float()).unflatten(2, q.shape[2:4]).to(q.dtype)

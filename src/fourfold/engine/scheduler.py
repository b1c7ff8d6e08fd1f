"""Who computes which tokens in the next step: continuous batching with chunked prefill and preemption.

``running`` is in order of arrival, and at most its last sequence is still reading its prompt, so walking it
in order serves decodes first. When blocks run out, the youngest sequence gives its blocks back and computes
again later (its tokens are kept, so nothing it has said changes). A sequence is admitted only when its whole
prompt fits, so that prompts never push each other out halfway.
"""

from collections import deque
from dataclasses import dataclass

from fourfold.engine.kv_cache import BlockPool
from fourfold.engine.requests import EngineConfig
from fourfold.engine.sequence import Sequence


@dataclass(slots=True)
class Chunk:
    """Compute ``count`` tokens of ``sequence`` from position ``start``."""

    sequence: Sequence
    start: int
    count: int

    @property
    def yields_token(self) -> bool:
        """Whether this chunk reaches the sequence's end, so that its last logits choose a token."""
        return self.start + self.count == len(self.sequence.tokens)


class Scheduler:
    """Queues of sequences over one pool of KV blocks."""

    def __init__(self, config: EngineConfig, pool: BlockPool):
        self.config, self.pool = config, pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.prefix_hit_tokens = 0

    def add(self, sequence: Sequence) -> None:
        """Queue ``sequence`` behind all others."""
        self.waiting.append(sequence)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step, decodes first; empty only when nothing is running or waiting."""
        chunks: list[Chunk] = []
        budget = self.config.max_batch_tokens
        preempted = self.preemptions
        index = 0
        while index < len(self.running) and budget:
            sequence = self.running[index]
            if self._make_room(sequence):
                budget -= self._chunk(sequence, budget, chunks)
                index += 1
        while preempted == self.preemptions and budget and self._admit():
            budget -= self._chunk(self.running[-1], budget, chunks)
        return chunks

    def _chunk(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        count = min(len(sequence.tokens) - sequence.computed, budget)
        chunks.append(Chunk(sequence, sequence.computed, count))
        return count

    def _make_room(self, sequence: Sequence) -> bool:
        """Blocks for all tokens of ``sequence``, from the youngest if need be; False when that is itself."""
        while not sequence.table.grow(len(sequence.tokens)):
            youngest = self.running.pop()
            youngest.table.release()
            youngest.computed = 0
            self.waiting.appendleft(youngest)
            self.preemptions += 1
            if youngest is sequence:
                return False
        return True

    def _admit(self) -> bool:
        """Move the oldest waiting sequence to running if a place and blocks for all its tokens are free."""
        if not self.waiting or len(self.running) >= self.config.max_batch_size:
            return False
        sequence = self.waiting[0]
        hits = sequence.table.reuse(sequence.tokens)
        if not sequence.table.grow(len(sequence.tokens)):
            sequence.table.release()
            return False
        sequence.computed = hits
        sequence.cached = hits if sequence.cached is None else sequence.cached
        self.prefix_hit_tokens += hits
        self.running.append(self.waiting.popleft())
        return True

    def computed(self, chunk: Chunk) -> None:
        """Account for a chunk that has run: its full blocks may be shared from now on."""
        sequence = chunk.sequence
        sequence.computed = chunk.start + chunk.count
        sequence.table.publish(sequence.tokens, sequence.computed)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished or aborted sequence and free its blocks."""
        sequence.table.release()
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

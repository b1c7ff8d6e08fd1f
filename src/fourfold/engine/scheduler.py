"""Who computes which tokens in the next step: continuous batching with chunked prefill and preemption.

``running`` is in order of arrival, and at most its last sequence is still reading its prompt, so walking it
in order serves decodes first. When blocks run out, the youngest sequence gives its blocks back and computes
again later (its tokens are kept, so nothing it has said changes). A sequence is admitted only when its whole
prompt fits, so that prompts never push each other out halfway. While others decode, prompts are read in
smaller pieces, or all would wait as long as for hundreds of tokens: from 32 rows on, a row costs the same
whatever the step's size. Drafts (see ``speculation``) come last: they take what budget and blocks are left.
"""

from collections import deque
from dataclasses import dataclass, field

from fourfold.engine.kv_cache import BlockPool
from fourfold.engine.requests import EngineConfig
from fourfold.engine.sequence import Sequence
from fourfold.engine.speculation import worthwhile

SHARE_BESIDE_DECODES = 4  # of a step's tokens, prompts take one in so many while other sequences decode


@dataclass(slots=True)
class Chunk:
    """Compute ``count`` tokens of ``sequence`` from position ``start``, the last of them ``draft``."""

    sequence: Sequence
    start: int
    count: int
    draft: list[int] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        """The ``count`` tokens."""
        known = self.count - len(self.draft)
        return self.sequence.tokens[self.start : self.start + known] + self.draft

    @property
    def yields_token(self) -> bool:
        """Whether this chunk reaches the sequence's end, so that the logits after it choose a token."""
        return self.start + self.count - len(self.draft) == len(self.sequence.tokens)


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
        budget = self._budget()
        preempted = self.preemptions
        index = 0
        while index < len(self.running) and budget:
            sequence = self.running[index]
            if self._make_room(sequence):
                budget -= self._chunk(sequence, budget, chunks)
                index += 1
        while preempted == self.preemptions and budget and self._admit():
            budget -= self._chunk(self.running[-1], budget, chunks)
        if self.config.speculative_tokens:
            self._speculate(chunks, budget)
        return chunks

    def _budget(self) -> int:
        """Tokens of the next step."""
        most = self.config.max_batch_tokens
        decoding = sum(sequence.computed == len(sequence.tokens) - 1 for sequence in self.running)
        return min(most, decoding + -(-most // SHARE_BESIDE_DECODES)) if decoding else most

    def _chunk(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        count = min(len(sequence.tokens) - sequence.computed, budget)
        chunks.append(Chunk(sequence, sequence.computed, count))
        return count

    def _speculate(self, chunks: list[Chunk], budget: int) -> None:
        """Add drafts to the chunks that yield tokens, plain decodes staying first."""
        yielding = [chunk for chunk in chunks if chunk.yields_token]
        for chunk in yielding:
            most = min(budget, self.config.speculative_tokens)
            draft = chunk.sequence.propose(most, worthwhile(len(yielding)))
            if draft and chunk.sequence.table.grow(len(chunk.sequence.tokens) + len(draft)):
                chunk.draft, chunk.count = draft, chunk.count + len(draft)
                budget -= len(draft)
        chunks.sort(key=lambda chunk: chunk.count > 1)

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
        """Account for a chunk that has run, after its token is accepted: full blocks may be shared now.

        Of a draft only what was accepted counts; the keys and values of the rest will be overwritten.
        """
        sequence = chunk.sequence
        sequence.computed = min(chunk.start + chunk.count, len(sequence.tokens) - 1)
        sequence.table.publish(sequence.tokens, sequence.computed)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished or aborted sequence and free its blocks."""
        sequence.table.release()
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

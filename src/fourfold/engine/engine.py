"""The engine: a model, its tokenizer, a paged cache and a scheduler; requests in, tokens out.

It is synchronous and for one thread: whoever owns it calls ``step`` while ``has_work``.
"""

from collections.abc import Sequence as Seq
from pathlib import Path

import numpy as np
import torch

from fourfold import kernels
from fourfold.checkpoint import Checkpoint, open_checkpoint
from fourfold.core.errors import UsageError
from fourfold.core.machine import usable_cores
from fourfold.core.records import ModelCard
from fourfold.engine.kv_cache import BlockPool, BlockTable, KVCache
from fourfold.engine.loading import (
    build_kv_format,
    choose_dtype,
    find_architecture,
    input_parts,
    kv_block_count,
)
from fourfold.engine.native import NativeDecoder
from fourfold.engine.obstacles import obstacle
from fourfold.engine.packed_cache import PackedCache
from fourfold.engine.requests import (
    Completion,
    EngineConfig,
    EngineStats,
    Request,
    SamplingParams,
    TokenOutput,
)
from fourfold.engine.sampling import Choice, SamplingState, choose
from fourfold.engine.scheduler import Chunk, Scheduler
from fourfold.engine.sequence import Sequence
from fourfold.engine.tokenizer import Tokenizer
from fourfold.engine.torch_decoder import TorchDecoder
from fourfold.engine.weights import Weights

LEAST_CACHED_BYTES = 32 << 20  # less is packed as soon as it is read


class Engine:
    """A loaded model that continues many prompts at once. Make one with ``Engine.load``."""

    def __init__(self, checkpoint: Checkpoint, config: EngineConfig):
        threads = config.threads or usable_cores()
        torch.set_num_threads(threads)
        kernels.set_threads(threads)
        self.config = config
        self._card = checkpoint.card()
        architecture = find_architecture(checkpoint)  # first the quick looks, then the weights
        self.tokenizer = Tokenizer.load(checkpoint)
        weights = Weights(checkpoint, choose_dtype(checkpoint.config, config))
        self.model = architecture(checkpoint.config, weights)
        shape = self.model.shape
        self._kv_format = build_kv_format(checkpoint, config, self.model)
        self._card = self._card.model_copy(update={"kv_cache_format": self._kv_format.name})
        blocks = kv_block_count(config, shape, self._kv_format)
        self._decoder = self._build_decoder(checkpoint, weights)
        self.cache = KVCache(shape.layers, blocks, config.kv_block_size, shape.kv_heads, self._kv_format)
        self.scheduler = Scheduler(config, BlockPool(blocks, config.kv_block_size, config.prefix_cache))
        self._sequences: dict[str, Sequence] = {}
        self._counters = EngineStats(kv_tokens_total=self.scheduler.pool.total * config.kv_block_size)

    def _build_decoder(self, checkpoint: Checkpoint, weights: Weights) -> NativeDecoder | TorchDecoder:
        """The model as a C++ program, or in torch where something stands in the way of that."""
        if problem := obstacle(self.model, self._kv_format, self.config):
            weights.pack_all(input_parts(checkpoint.config, self.config))
            return TorchDecoder(self.model, self._kv_format, problem)
        cache = PackedCache.open(checkpoint) if self.config.packed_cache else None
        native = NativeDecoder(self.model, self._kv_format, self.config, cache)
        if cache is not None and native.packed_bytes >= LEAST_CACHED_BYTES:
            cache.finish()
        return native

    @classmethod
    def load(cls, source: str | Path, config: EngineConfig | None = None) -> "Engine":
        """Open ``source`` (folder, GGUF file or hub name) and hold it in memory, quantized weights packed.

        What is not packed (an untied embedding) stays mapped: the files may be replaced while the engine
        runs, but not overwritten in place.

        Raises UsageError for an unknown architecture, FourfoldError for a checkpoint that does not hold
        together or has no tokenizer.
        """
        return cls(open_checkpoint(source), config or EngineConfig())

    @property
    def card(self) -> ModelCard:
        """What the model is, and how this engine holds its keys and values."""
        return self._card

    @property
    def arithmetic(self) -> str:
        """``int8`` or ``exact`` in C++, or ``torch`` and why."""
        return self._decoder.arithmetic

    @property
    def computed(self) -> str:
        """Which way the model is computed, in words for a person."""
        way, _, reason = self.arithmetic.partition(": ")
        dtype = str(self.model.dtype).removeprefix("torch.")
        way = f"{way} ({reason})" if reason else f"{way} arithmetic in C++"
        return f"{way}, {dtype} for what is not quantized"

    @property
    def max_positions(self) -> int:
        """The longest sequence the model takes, in tokens."""
        return self.model.shape.max_positions

    @property
    def max_request_tokens(self) -> int:
        """The longest request, prompt and output together, that the model and the KV cache can hold."""
        return min(self.max_positions, self._counters.kv_tokens_total)

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._sequences)

    @property
    def stats(self) -> EngineStats:
        """Gauges of this moment and counters since loading; a live record, read it and do not keep it."""
        stats, scheduler = self._counters, self.scheduler
        stats.running, stats.waiting = len(scheduler.running), len(scheduler.waiting)
        stats.kv_tokens_used = (scheduler.pool.total - len(scheduler.pool.free)) * self.config.kv_block_size
        stats.prefix_hit_tokens, stats.preemptions = scheduler.prefix_hit_tokens, scheduler.preemptions
        return stats

    def add(self, request: Request) -> None:
        """Queue a request. Raises UsageError when it can never run: empty, too long, or an id in use."""
        limit = self._check(request)
        sampling, eos = request.sampling, self.tokenizer.eos_token_ids
        self._sequences[request.request_id] = sequence = Sequence(
            request,
            BlockTable(self.scheduler.pool),
            SamplingState(sampling, request.prompt_token_ids, self.model.shape.vocabulary, eos),
            self.tokenizer.stream(),
            set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else eos),
            limit,
            range(self.config.speculative_min_ngram, self.config.speculative_max_ngram + 1),
        )
        self._counters.prompt_tokens += len(request.prompt_token_ids)
        self.scheduler.add(sequence)

    def abort(self, request_id: str) -> bool:
        """Drop a request and free its cache; no output follows. False when it is not (or no longer) here."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return False
        self.scheduler.remove(sequence)
        self._counters.aborted += 1
        return True

    def step(self) -> list[TokenOutput]:
        """One forward pass over the next batch. Returns its new tokens, a sequence's own ones in order."""
        chunks = self.scheduler.schedule()
        if not chunks:
            return []
        yielding = [chunk for chunk in chunks if chunk.yields_token]
        runs = self._choose(chunks, yielding)
        self._counters.steps += 1  # nothing has advanced before here, so a step that raised can be repeated
        outputs = [o for c, run in zip(yielding, runs, strict=True) for o in c.sequence.accept(run)]
        for chunk in chunks:
            self.scheduler.computed(chunk)
        self._counters.generated_tokens += len(outputs)
        self._counters.draft_tokens += sum(len(chunk.draft) for chunk in yielding)
        self._counters.accepted_draft_tokens += len(outputs) - len(yielding)
        self._retire([c.sequence for c in yielding if c.sequence.finished])
        return outputs

    def _choose(self, chunks: list[Chunk], yielding: list[Chunk]) -> list[list[Choice]]:
        """The next tokens of the sequences of ``yielding``, which are those of ``chunks`` that end."""
        states = [chunk.sequence.sampling for chunk in yielding]
        drafts = [chunk.draft for chunk in yielding]
        rows, end = [], 0  # where a token is chosen: after the last known token, and after each of its draft
        for chunk in chunks:
            end += chunk.count
            rows += range(end - 1 - len(chunk.draft), end) if chunk.yields_token else ()
        logits, likeliest = self._decoder.step(self.cache, chunks, rows)
        return choose(logits, states, drafts, likeliest) if rows else []

    def generate(
        self, prompts: Seq[str | list[int]], sampling: SamplingParams | Seq[SamplingParams] | None = None
    ) -> list[Completion]:
        """Continue all prompts to their ends; text gets the model's special tokens, as in its training.

        ``sampling`` is one for all, or one for each. Raises UsageError as ``add`` does, when there are more
        or fewer of them than prompts, or when other requests are unfinished, whose outputs would be lost.
        """
        if self.has_work:
            raise UsageError("generate needs an idle engine: finish or abort the other requests first.")
        if sampling is None or isinstance(sampling, SamplingParams):
            sampling = [sampling or SamplingParams()] * len(prompts)
        if len(sampling) != len(prompts):
            raise UsageError(
                f"generate got {len(prompts)} prompts but {len(sampling)} SamplingParams; give one for all, "
                "or one for each."
            )
        ids = [
            p if isinstance(p, list) else self.tokenizer.encode(p, add_special_tokens=True) for p in prompts
        ]
        done = {str(i): Completion(tokens, [], "", "length") for i, tokens in enumerate(ids)}
        try:
            for (key, completion), params in zip(done.items(), sampling, strict=True):
                self.add(Request(key, completion.prompt_token_ids, params))
            while self.has_work:
                for output in self.step():
                    done[output.request_id].extend(output)
        finally:
            for key in done:
                self.abort(key)
        return list(done.values())

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without special tokens added."""
        return self.tokenizer.encode(text)

    def logits(self, token_ids: list[int]) -> np.ndarray:
        """Float32 logits [T, V] for a sequence of T token ids, each row predicting the next token.

        One pass, beside the paged cache. Raises UsageError for no tokens, too many, or unknown ones.
        """
        self._check_tokens(token_ids)
        if len(token_ids) > self.max_positions:
            raise UsageError(
                f"{len(token_ids)} tokens are more than the model's {self.max_positions} positions."
            )
        return self._decoder.logits(token_ids)

    @property
    def layer_count(self) -> int:
        """How many decoder layers there are."""
        return self.model.shape.layers

    def embedded(self, token_ids: list[int]) -> np.ndarray:
        """Float32 states [T, H] of a sequence before the first layer. Raises UsageError for unknown ids."""
        self._check_tokens(token_ids)
        return self._decoder.embedded(token_ids)

    def through(self, hidden: np.ndarray, first: int, end: int) -> np.ndarray:
        """States [T, H] of a whole sequence from before layer ``first`` to before layer ``end``."""
        return self._decoder.through(hidden, first, end)

    def logits_of(self, hidden: np.ndarray) -> np.ndarray:
        """Float32 logits [T, V] of states [T, H] that have passed every layer."""
        return self._decoder.logits_of(hidden)

    def _retire(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self.scheduler.remove(sequence)
            del self._sequences[sequence.request.request_id]
        self._counters.finished += len(sequences)

    def _check(self, request: Request) -> int:
        """The length in tokens at which ``request`` ends. Raises UsageError when it can never run."""
        if request.request_id in self._sequences:
            raise UsageError(f"A request with id '{request.request_id}' is unfinished; choose another id.")
        self._check_tokens(request.prompt_token_ids)
        prompt, room = len(request.prompt_token_ids), self.max_request_tokens
        if prompt >= self.max_positions:
            raise UsageError(
                f"The prompt has {prompt} tokens, but prompt and output share the model's "
                f"{self.max_positions} positions. Shorten the prompt."
            )
        wanted = min(prompt + (request.sampling.max_tokens or room), self.max_positions)
        if request.sampling.max_tokens is None and prompt < room:
            wanted = room
        if wanted > room:
            raise UsageError(
                f"The request may grow to {wanted} tokens ({prompt} of prompt), but the KV cache holds "
                f"{room}. Ask for fewer tokens, or load the model with a larger kv_cache_tokens."
            )
        return wanted

    def _check_tokens(self, token_ids: list[int]) -> None:
        """Raises UsageError when there are none, or one is outside the vocabulary."""
        vocabulary = self.model.shape.vocabulary
        if not token_ids:
            raise UsageError("There are no tokens: a prompt needs at least one.")
        if min(token_ids) < 0 or max(token_ids) >= vocabulary:
            raise UsageError(
                f"Token ids run from {min(token_ids)} to {max(token_ids)}, but this model knows 0 to "
                f"{vocabulary - 1}. Encode the text with this model's own tokenizer."
            )

"""A decoder as one C++ program: a step is one call without the GIL, and Python only says what it is about.

``obstacles.py`` says which models the program has no words for; ``torch_decoder.py`` computes those, and
``recording.py`` writes down the others. States are float32 between the linear layers, whose inputs are
rounded to int8 in blocks of 32 (arithmetic ``int8``) or to bfloat16 (``exact``), after the checkpoint's own
scheme has turned and rounded them; int8 takes the place of other 8-bit formats. A result depends neither on
what is beside it in the batch nor on the threads.
"""

from array import array
from collections.abc import Iterator

import numpy as np
import torch

from fourfold.engine.decoder import Decoder
from fourfold.engine.kv_cache import KVCache
from fourfold.engine.kv_format import KVFormat
from fourfold.engine.packed_cache import PackedCache
from fourfold.engine.recording import Recording
from fourfold.engine.requests import EngineConfig
from fourfold.engine.scheduler import Chunk

HEAD_ROWS = 64  # of a whole sequence whose logits are computed at a time


class NativeDecoder:
    """A recorded model. Sequences' tokens go in, logits of the chosen rows or their largest come out."""

    def __init__(
        self, model: Decoder, form: KVFormat, config: EngineConfig, cache: PackedCache | None = None
    ):
        """Of ``model``, which has no obstacle, the weights are packed and the tensors gone after this.

        ``form`` is how the KV caches that it will use are held. Weights that ``cache`` has are not even read.
        """
        shape = model.shape
        self.form, self.block_size = form, config.kv_block_size
        self.layers, self.kv_heads = shape.layers, shape.kv_heads
        self._cache: KVCache | None = None
        recording = Recording(model, form, config, cache)
        recording.record()
        self.program, self.hidden, self.marks = recording.program, recording.x, recording.marks
        self.arithmetic, self.packed_bytes = recording.arithmetic, recording.packed_bytes
        # numpy's views: torch takes as long for slices as a small model for half a layer
        self._logits = self.program.logits.data.numpy()[:, : shape.vocabulary]
        self._largest = self.program.tokens.numpy()[0]

    def use(self, cache: KVCache) -> None:
        """Keys and values go to ``cache`` and come from there from now on."""
        if cache is self._cache:
            return
        self._cache, data = cache, cache.data
        self.program.native.use_cache(data.flatten(1), data.shape[1], data.shape[2])

    def step(self, cache: KVCache, chunks: list[Chunk], chosen: list[int]) -> tuple[np.ndarray, list[int]]:
        """Run a step over ``cache``: logits [n, V] of the ``chosen`` rows and the places of their largest.

        The logits are there until the next step.
        """
        self.use(cache)
        tokens, spans = array("i"), array("i")
        for chunk in chunks:
            tokens.fromlist(chunk.token_ids)
            spans.extend((chunk.count, chunk.start, len(chunk.sequence.table.blocks)))
        tables = b"".join([chunk.sequence.table.blocks for chunk in chunks])
        self.program.run(tokens, spans, tables, array("i", chosen))
        return self._logits[: len(chosen)], self._largest[: len(chosen)].tolist()

    def embedded(self, token_ids: list[int]) -> np.ndarray:
        """States [T, H] before the first layer."""
        return self._states(token_ids, None, 0, 1)

    def through(self, hidden: np.ndarray, first: int, end: int) -> np.ndarray:
        """States [T, H] of a whole sequence from before layer ``first`` to before layer ``end``."""
        return self._states([0] * len(hidden), hidden, self.marks[first], self.marks[end])

    def logits_of(self, hidden: np.ndarray) -> np.ndarray:
        """Logits [T, V] of states [T, H] that have passed every layer."""
        result = np.empty((len(hidden), self.program.logits.columns), dtype=np.float32)
        for start in range(0, len(hidden), self.program.rows):
            rows = slice(start, start + self.program.rows)
            self._load(hidden[rows])
            self._head(result[rows])
        return result

    def logits(self, token_ids: list[int]) -> np.ndarray:
        """Logits [T, V] of a whole sequence, beside the cache that is in use."""
        result = np.empty((len(token_ids), self.program.logits.columns), dtype=np.float32)
        for rows in self._pass(token_ids, None, 0, self.marks[-1]):
            self._head(result[rows])
        return result

    def _states(self, token_ids: list[int], hidden: np.ndarray | None, first: int, end: int) -> np.ndarray:
        result = np.empty((len(token_ids), self.hidden.columns), dtype=np.float32)
        for rows in self._pass(token_ids, hidden, first, end):
            result[rows] = self.hidden.first(len(result[rows])).numpy()
        return result

    def _pass(self, token_ids: list[int], hidden: np.ndarray | None, first: int, end: int) -> Iterator[slice]:
        """Operations ``first`` to ``end`` - 1 over a whole sequence, in as many steps as it takes.

        After each step the rows are told whose states are there; ``hidden`` are states to begin with.
        """
        blocks = -(-len(token_ids) // self.block_size)
        self.use(KVCache(self.layers, blocks, self.block_size, self.kv_heads, self.form))
        tables = array("i", range(blocks))
        for start in range(0, len(token_ids), self.program.rows):
            rows = slice(start, start + self.program.rows)
            tokens = array("i", token_ids[rows])
            spans = array("i", (len(tokens), start, blocks))
            if hidden is not None:
                self._load(hidden[rows])
                self.program.run(tokens, spans, tables, first=1, end=self.marks[0])
            self.program.run(tokens, spans, tables, array("i", range(len(tokens))), first, end)
            yield rows

    def _load(self, hidden: np.ndarray) -> None:
        self.hidden.first(len(hidden)).copy_(torch.from_numpy(hidden))

    def _head(self, out: np.ndarray) -> None:
        """Logits ``out`` [n, V] of the first n states."""
        for start in range(0, len(out), HEAD_ROWS):
            count = min(HEAD_ROWS, len(out) - start)
            self.hidden.first(count).copy_(self.hidden.first(start + count)[start:])
            blocks = -(-count // self.block_size)
            tokens, tables = array("i", bytes(4 * count)), array("i", bytes(4 * blocks))
            spans, chosen = array("i", (count, 0, blocks)), array("i", range(count))
            self.program.run(tokens, spans, tables, chosen, first=self.marks[-1])
            out[start : start + count] = self.program.logits.first(count).numpy()

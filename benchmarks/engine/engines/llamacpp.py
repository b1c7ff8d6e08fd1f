"""llama.cpp through libllama's C API, by the ctypes binding of llama-cpp-python.

One ``llama_decode`` a step: a token of every running sequence, and the prompts that still fit the batch.
The likeliest token is looked for by numpy in the logits where libllama left them.
"""

import ctypes
from dataclasses import dataclass

import llama_cpp as lib
import numpy as np
import worker


@dataclass
class Sequence:
    """A slot of the KV cache, the tokens that are still to be given to the model, and how many to make."""

    key: int
    slot: int
    given: list[int]
    left: int
    position: int = 0


class LlamaCpp:
    """The library behind the three calls that are timed. ``settings`` may set ``flash_attn`` (0, 1, -1)."""

    def __init__(self, model: str, threads: int, sequences: int, tokens: int, settings: dict | None = None):
        quiet = lib.llama_log_callback(lambda level, text, data: None)
        self.quiet = quiet
        lib.llama_log_set(quiet, None)
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(model.encode(), lib.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {model}")
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = tokens, 512, 512
        params.n_seq_max, params.n_threads, params.n_threads_batch = sequences, threads, threads
        params.kv_unified = True  # sequences share the cells, as blocks are shared in the other engines
        params.flash_attn_type = (settings or {}).get("flash_attn", -1)
        self.context = lib.llama_init_from_model(self.model, params)
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.batch = lib.llama_batch_init(512, 0, 1)
        self.slots, self.waiting, self.running = list(range(sequences)), [], []

    @property
    def busy(self) -> bool:
        """Whether anything is unfinished."""
        return bool(self.waiting or self.running)

    def add(self, key: int, prompt: list[int], count: int) -> None:
        """Queue."""
        self.waiting.append((key, prompt, count))

    def step(self) -> list[tuple[int, int]]:
        """One llama_decode."""
        chosen = self.schedule()
        ends = self.fill(chosen)
        if lib.llama_decode(self.context, self.batch):
            raise SystemExit("llama_decode failed")
        outputs = [(s, self.likeliest(end)) for s, end in zip(chosen, ends, strict=True)]
        for sequence, token in outputs:
            self.advance(sequence, token)
        return [(sequence.key, token) for sequence, token in outputs]

    def schedule(self) -> list[Sequence]:
        """All that run, and as many whole new prompts as the batch has room for."""
        room = 512 - len(self.running)
        while self.waiting and self.slots and len(self.waiting[0][1]) <= room:
            key, prompt, count = self.waiting.pop(0)
            room -= len(prompt)
            self.running.append(Sequence(key, self.slots.pop(), prompt, count))
        return list(self.running)

    def fill(self, chosen: list[Sequence]) -> list[int]:
        """Write the batch; the place of each sequence's last token."""
        batch, row, ends = self.batch, 0, []
        for sequence in chosen:
            for token in sequence.given:
                batch.token[row], batch.pos[row] = token, sequence.position
                batch.n_seq_id[row], batch.seq_id[row][0], batch.logits[row] = 1, sequence.slot, 0
                row, sequence.position = row + 1, sequence.position + 1
            batch.logits[row - 1] = 1
            ends.append(row - 1)
        batch.n_tokens = row
        return ends

    def likeliest(self, place: int) -> int:
        """The token with the largest logit at ``place`` of the batch."""
        logits = lib.llama_get_logits_ith(self.context, place)
        return int(np.argmax(np.ctypeslib.as_array(logits, (self.vocabulary,))))

    def advance(self, sequence: Sequence, token: int) -> None:
        """Take in a token; a finished sequence leaves its slot."""
        sequence.given, sequence.left = [token], sequence.left - 1
        if not sequence.left:
            self.running.remove(sequence)
            lib.llama_memory_seq_rm(lib.llama_get_memory(self.context), sequence.slot, -1, -1)
            self.slots.append(sequence.slot)


if __name__ == "__main__":
    assert ctypes.sizeof(ctypes.c_void_p) == 8
    worker.serve(LlamaCpp, "llama-cpp-python")

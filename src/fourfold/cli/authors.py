"""Who writes the calibration text where none is given: the model itself, on the engine or wholly on a GPU.

A sequence begins as the model's texts do, with one token at random from the vocabulary; the next few are the
likeliest, so that a beginning makes sense, and the rest are drawn from the model's own distribution (LLM-QAT,
arXiv:2305.17888: "hybrid" sampling). Where a text ends the next one begins.
"""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from fourfold.engine import Engine, Tokenizer

GREEDY_TOKENS = 3
SEQUENCES_AT_A_TIME = 32


def author_for(
    model: str, samples: int, sequence_tokens: int, seed: int, device: str
) -> "Callable[[int, int], torch.Tensor]":
    """``write(first, count)``: int64 [count, T], each sequence following from its number and the seed.

    The engine writes on a CPU, if it knows the architecture; else transformers' own model does, in float32.
    """
    from fourfold.checkpoint import open_checkpoint
    from fourfold.engine import Tokenizer
    from fourfold.engine.loading import ARCHITECTURES

    checkpoint = open_checkpoint(model)
    architecture = str(checkpoint.config.get("model_type")).replace("_", "-")
    if device == "cpu" and architecture in ARCHITECTURES.names():
        return EngineAuthor(model, samples, sequence_tokens, seed).write
    from fourfold.compress.calibrated.author import WholeAuthor

    tokenizer = Tokenizer.load(checkpoint)
    vocabulary = checkpoint.config.get("vocab_size") or len(tokenizer)

    def begin(number: int) -> list[int]:
        return beginning(tokenizer, vocabulary, seed_of(seed, number))

    return WholeAuthor(
        model, samples, sequence_tokens, device, begin, lambda number: seed_of(seed, number)
    ).write


class EngineAuthor:
    """Lets the engine write; it is loaded when first asked, and let go after the last sequence."""

    def __init__(self, model: str, samples: int, sequence_tokens: int, seed: int):
        self.model, self.samples, self.sequence_tokens, self.seed = model, samples, sequence_tokens, seed
        self._engine: Engine | None = None

    def write(self, first: int, count: int) -> "torch.Tensor":
        """The sequences from number ``first`` on, [count, T]: each follows from its number and the seed."""
        import torch

        from fourfold.engine import SamplingParams

        engine = self._engine = self._engine or self._load()
        length, seeds = self.sequence_tokens, [seed_of(self.seed, first + n) for n in range(count)]
        vocabulary = engine.model.shape.vocabulary
        begun = [beginning(engine.tokenizer, vocabulary, seed) for seed in seeds]
        for tokens, temperature in ((GREEDY_TOKENS, 0.0), (length, 1.0)):
            settings = [
                SamplingParams(
                    max_tokens=max(1, min(tokens, length - len(ids))),
                    temperature=temperature,
                    seed=seed,
                    ignore_eos=True,
                )
                for ids, seed in zip(begun, seeds, strict=True)
            ]
            done = engine.generate(begun, settings)
            begun = [(ids + c.token_ids)[:length] for ids, c in zip(begun, done, strict=True)]
        if first + count >= self.samples:
            self._engine = engine = None  # its memory is needed for the layers
        return torch.tensor(begun, dtype=torch.int64)

    def _load(self) -> "Engine":
        import torch

        from fourfold.engine import Engine, EngineConfig

        config = EngineConfig(
            max_batch_size=SEQUENCES_AT_A_TIME,
            max_batch_tokens=512,
            kv_cache_tokens=SEQUENCES_AT_A_TIME * (self.sequence_tokens + 2 * 16),
            prefix_cache=False,
            threads=torch.get_num_threads(),
        )
        return Engine.load(self.model, config)


def seed_of(seed: int, number: int) -> int:
    """The seed of sequence ``number``: 32 bits, for torch's generator on the CPU looks at no more."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4])


def beginning(tokenizer: "Tokenizer", vocabulary: int, seed: int) -> list[int]:
    """The beginning token, where the model was trained with one, and a token that stands for text."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    start = tokenizer.encode("", add_special_tokens=True)[:1]
    while True:
        token = int(torch.randint(min(len(tokenizer), vocabulary), (1,), generator=generator))
        if tokenizer.decode([token]):
            return [*start, token]

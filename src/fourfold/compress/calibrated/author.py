"""Calibration text from a model that is wholly in memory: on a GPU, and for architectures without an engine.

Sequences begin with tokens that are given, go on with the likeliest few, so that a beginning makes sense, and
are then drawn from the model's own distribution (LLM-QAT, arXiv:2305.17888, "hybrid" sampling). Where a text
ends the next one begins. Price: the model in float32 on the device, and one forward pass per token.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fourfold.compress.calibrated.memory import is_out_of_memory, release
from fourfold.compress.calibrated.skeleton import Skeleton
from fourfold.compress.calibrated.whole import WholeModel
from fourfold.compress.recipe import Recipe
from fourfold.compress.resolve import open_source, resolve
from fourfold.core.errors import FourfoldError

GREEDY_TOKENS = 3
BEGINNING_TOKENS = (8, 16, 32, 64, 128)


class WholeAuthor:
    """Writes ``samples`` sequences of ``sequence_tokens`` with the model of ``source``, loaded when needed.

    ``begin(number)`` gives the first tokens of a sequence, equally many of each; ``seed_of(number)``, of 32
    bits, decides the rest.
    """

    def __init__(
        self,
        source: str | Path,
        samples: int,
        sequence_tokens: int,
        device: str,
        begin: Callable[[int], list[int]],
        seed_of: Callable[[int], int],
    ):
        self.source, self.samples, self.sequence_tokens = source, samples, sequence_tokens
        self.device, self.begin, self.seed_of = torch.device(device), begin, seed_of
        self._model: WholeModel | None = None

    def write(self, first: int, count: int) -> torch.Tensor:
        """The sequences from number ``first`` on, int64 [count, T].

        Raises FourfoldError when the model does not fit into memory.
        """
        try:
            found = self._write(range(first, first + count))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise FourfoldError(
                f"{self.source} does not fit into the memory of {self.device} as a whole, which it must to "
                "write its own calibration text. Give a text with --calibration."
            ) from error
        if first + count >= self.samples:
            self._model = None  # its memory is needed for the layers
            release(self.device)
        return found

    @torch.no_grad()
    def _write(self, numbers: range) -> torch.Tensor:
        net = (self._model or self._load()).net
        generators = [torch.Generator().manual_seed(self.seed_of(number)) for number in numbers]
        tokens = new = torch.tensor([self.begin(number) for number in numbers])
        greedy_until, cache = tokens.shape[1] + GREEDY_TOKENS, None
        while tokens.shape[1] < self.sequence_tokens:
            logits, cache = _next(net, new.to(self.device), cache)
            new = logits.argmax(-1).cpu() if tokens.shape[1] < greedy_until else draw(logits, generators)
            new = new[:, None]
            tokens = torch.cat([tokens, new], 1)
        return tokens[:, : self.sequence_tokens]

    def _load(self) -> WholeModel:
        plain = resolve(open_source(self.source), Recipe.model_validate({"name": "as it is"}))
        self._model = WholeModel(Skeleton(plain.model, self.device))
        return self._model


def draw(logits: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
    """One token for each row of ``logits`` [n, V], drawn by its own generator: int64 [n]."""
    sums = logits.double().softmax(-1).cumsum(-1).cpu()
    chance = torch.stack([torch.rand(1, dtype=torch.float64, generator=g) for g in generators])
    return torch.searchsorted(sums, chance * sums[:, -1:], right=True).clamp_max(logits.shape[-1] - 1)[:, 0]


@torch.no_grad()
def continue_together(
    model: WholeModel,
    text: torch.Tensor,
    samples: int,
    seed: int,
    at_once: int = 1024,
    enough: Callable[[int, int], bool] = lambda done, samples: False,
) -> torch.Tensor:
    """``samples`` sequences, int64 [samples, T], that begin with a run of tokens from anywhere in ``text``
    [n, T] and go on as the model does. Runs are of ``BEGINNING_TOKENS``, but at most half of T. Drawn
    from one generator on the model's device, which is far faster than one for each sequence; what is written
    then depends on that device and on ``at_once``. It ends before ``samples`` once ``enough(done, samples)``.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    text, pieces = text.to(model.device), []
    at_once = min(at_once, math.ceil(samples / len(BEGINNING_TOKENS)))
    for number, first in enumerate(range(0, samples, at_once)):
        if enough(first, samples):
            break
        length = min(BEGINNING_TOKENS[number % len(BEGINNING_TOKENS)], text.shape[1] // 2)
        begun = runs_of(text, min(at_once, samples - first), length, generator)
        pieces.append(_go_on(model, begun, text.shape[1], generator))
    return torch.cat(pieces)


def runs_of(text: torch.Tensor, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """``count`` runs of ``length`` neighbours from random places in ``text`` [n, T]: [count, length]."""
    draws = {"generator": generator, "device": text.device}
    rows = torch.randint(len(text), (count, 1), **draws)
    starts = torch.randint(text.shape[1] - length + 1, (count, 1), **draws)
    return text[rows, starts + torch.arange(length, device=text.device)]


def _go_on(
    model: WholeModel, begun: torch.Tensor, sequence_tokens: int, generator: torch.Generator
) -> torch.Tensor:
    tokens, new, cache = [begun], begun, None
    for _ in range(sequence_tokens - begun.shape[1]):
        logits, cache = _next(model.net, new, cache)
        new = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        tokens.append(new)
    return torch.cat(tokens, 1).cpu()


def _next(net: nn.Module, new: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
    """After the tokens in ``cache`` and ``new`` [n, t]: float32 logits [n, V] of the next, and the cache."""
    with torch.autocast("cuda", torch.bfloat16, enabled=new.is_cuda):
        out = net(input_ids=new, past_key_values=cache, use_cache=True)
    return out.logits[:, -1].float(), out.past_key_values

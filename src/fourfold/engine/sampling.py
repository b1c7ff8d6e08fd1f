"""Choosing the next tokens of every sequence of a batch.

Order, as in vLLM: logprobs of the raw logits, then penalties, minimum length, temperature, top-k, top-p,
min-p, and one draw. A draw is one uniform number from the request's own generator, looked up in the
distribution over the vocabulary. Rows are taken one by one, so a seeded result depends on its own logits
only, never on its neighbours.

A request with a draft has a row for each draft token too. Each row counts only when the token chosen before
it is the draft's, so it is chosen from with the penalties that those tokens bring, and with the number that
belongs to its position.
"""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fourfold.engine.drawing import draw
from fourfold.engine.requests import SamplingParams

NEVER = float("-inf")
GREEDY_BELOW = 1e-5  # as in vLLM: colder than this, dividing by the temperature overflows


@dataclass(slots=True)
class Choice:
    """The chosen token, and the logprobs that were asked for."""

    token_id: int
    logprob: float | None = None
    top_logprobs: list[tuple[int, float]] | None = None


class SamplingState:
    """What one request carries from token to token: its generator and how often it has used each token."""

    def __init__(self, params: SamplingParams, prompt: list[int], vocabulary: int, eos: set[int]):
        self.params, self.prompt = params, prompt
        # as in vLLM, ignore_eos does not lift the ban: what asks for more tokens wants text, not ends
        self.banned_early = sorted(t for t in eos | set(params.stop_token_ids) if 0 <= t < vocabulary)
        self.generated = 0
        self.generator: random.Random | None = None
        if params.temperature >= GREEDY_BELOW:
            self.generator = random.Random(None if params.seed is None else params.seed % 2**64)
        self._drawn: deque[float] = deque()  # numbers of positions that have none chosen yet
        self.penalised = bool(
            params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
        )
        self.counts: dict[int, int] = dict.fromkeys(prompt, 0) if self.penalised else {}

    @property
    def edits_logits(self) -> bool:
        """Whether ``edit`` would change anything now."""
        return self.penalised or self.generated < self.params.min_tokens

    def lets(self, likeliest: int) -> bool:
        """Whether ``edit`` would leave this, the largest logit, the largest."""
        return not self.penalised and likeliest not in self.banned_early

    def edit(self, row: np.ndarray, ahead: Sequence[int] = ()) -> None:
        """Penalties (of output; repetition: prompt too) and the ban on early ends, in place on row [V].

        ``ahead``: tokens that have been chosen since ``chose`` was called last.
        """
        if self.penalised:
            self._penalise(row, _counted(dict(self.counts), ahead) if ahead else self.counts)
        if self.generated + len(ahead) < self.params.min_tokens:
            row[self.banned_early] = NEVER

    def _penalise(self, row: np.ndarray, counts: dict[int, int]) -> None:
        """``counts`` has the tokens of prompt and output, and how often each is in the output."""
        params, size = self.params, len(counts)
        tokens, uses = np.fromiter(counts, np.int64, size), np.fromiter(counts.values(), np.float32, size)
        logits = row[tokens]
        logits = np.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
        row[tokens] = logits - params.frequency_penalty * uses - params.presence_penalty * (uses > 0)

    def uniform(self, ahead: int) -> float:
        """The random number, from 0 to 1, of the position that is ``ahead`` of the next."""
        assert self.generator is not None
        while len(self._drawn) <= ahead:
            self._drawn.append(self.generator.random())
        return self._drawn[ahead]

    def chose(self, tokens: Sequence[int]) -> None:
        """Remember chosen tokens."""
        self.generated += len(tokens)
        if self.penalised:
            _counted(self.counts, tokens)
        for _ in tokens if self._drawn else ():
            self._drawn.popleft()


def _counted(counts: dict[int, int], tokens: Sequence[int]) -> dict[int, int]:
    for token in tokens:
        counts[token] = counts.get(token, 0) + 1
    return counts


def choose(
    logits: torch.Tensor | np.ndarray,
    states: list[SamplingState],
    drafts: list[list[int]] | None = None,
    likeliest: Sequence[int] | None = None,
) -> list[list[Choice]]:
    """The next tokens of each request, from 1 + len(draft) rows of ``logits`` [.., V] each.

    They are the part of the draft that would have been chosen anyway, and one more. Logits are floats of any
    size, of numpy in float32. ``likeliest`` [..] are the rows' first largest, where known already. States
    advance at the end, so none when anything raises.
    """
    rows = logits.float().numpy() if isinstance(logits, torch.Tensor) else logits
    largest = [None] * len(rows) if likeliest is None else likeliest
    at, runs = 0, []
    for state, draft in zip(states, drafts or [[]] * len(states), strict=True):
        end = at + len(draft) + 1
        runs.append(_run(rows[at:end], largest[at:end], state, draft))
        at = end
    for state, run in zip(states, runs, strict=True):
        state.chose([choice.token_id for choice in run])
    return runs


def _run(
    rows: np.ndarray, likeliest: Sequence[int | None], state: SamplingState, draft: list[int]
) -> list[Choice]:
    """Choices row by row, up to the first that is not the draft's."""
    choices: list[Choice] = []
    for row, largest, expected in zip(rows, likeliest, (*draft, None), strict=True):
        choices.append(_choice(row, largest, state, draft[: len(choices)]))
        if choices[-1].token_id != expected:
            break
    return choices


def _choice(row: np.ndarray, likeliest: int | None, state: SamplingState, ahead: list[int]) -> Choice:
    params, edited = state.params, row
    settled = state.generator is None and likeliest is not None and state.lets(likeliest)
    if state.edits_logits and not settled:
        edited, likeliest = row.copy(), None
        state.edit(edited, ahead)
    if state.generator is not None:
        token = draw(edited, params, state.uniform(len(ahead)))
    else:
        token = int(edited.argmax()) if likeliest is None else likeliest
    return Choice(token) if params.logprobs is None else Choice(token, *logprobs(row, token, params.logprobs))


def logprobs(row: np.ndarray, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """Log-probabilities in float32 logits ``row`` [V]: of ``token``, and of the ``count`` likeliest."""
    raw = torch.from_numpy(row).log_softmax(-1)
    values, indices = raw.topk(min(count, len(row)))
    return raw[token].item(), list(zip(indices.tolist(), values.tolist(), strict=True))

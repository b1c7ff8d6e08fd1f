"""Choosing the next tokens of every sequence of a batch.

Order, as in vLLM: logprobs of the raw logits, then penalties, minimum length, temperature, top-k, top-p,
min-p, and one draw. A draw is one uniform number from the request's own generator, looked up in the
distribution over the vocabulary. A seeded result depends on its own row of logits only, never on neighbours.

A request with a draft has a row for each draft token too. Each row counts only when the token chosen before
it is the draft's, so it is chosen from with the penalties that those tokens bring, and with the number that
belongs to its position. So all rows of a step are chosen from together.
"""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fourfold.engine.drawing import Asked, Draw, Logprobs, draw_all, logprobs_all
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
        self.filters = params.temperature, params.top_k, params.top_p, params.min_p
        self.penalised = bool(
            params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
        )
        self.counts: dict[int, int] = dict.fromkeys(prompt, 0) if self.penalised else {}

    def edits(self, likeliest: int) -> bool:
        """Whether ``edit`` could change the choice now; ``likeliest`` is the largest logit's token."""
        if self.penalised:
            return True
        early = self.generated < self.params.min_tokens
        return early and (self.generator is not None or likeliest in self.banned_early)

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


Place = tuple[SamplingState, list[int]]
"""Where a token is chosen: for whom, and after which tokens of its draft."""
NO_LOGPROBS = None, None


def choose(
    logits: torch.Tensor | np.ndarray,
    states: list[SamplingState],
    drafts: list[list[int]] | None = None,
    likeliest: list[int] | None = None,
) -> list[list[Choice]]:
    """The next tokens of each request, from 1 + len(draft) rows of ``logits`` [.., V] each.

    They are the part of the draft that would have been chosen anyway, and one more. Logits are floats of any
    size, of numpy in float32. ``likeliest`` [..] are the rows' first largest, where known already. States
    advance at the end, so none when anything raises.
    """
    rows = logits.float().numpy() if isinstance(logits, torch.Tensor) else logits
    drafts = drafts or [[]] * len(states)
    places = [(s, draft[:i]) for s, draft in zip(states, drafts, strict=True) for i in range(len(draft) + 1)]
    tokens = _tokens(rows, places, rows.argmax(-1).tolist() if likeliest is None else likeliest)
    runs, end = [], 0
    for draft in drafts:
        begin, end = end, end + len(draft) + 1
        runs.append(range(begin, begin + 1 + (_agreed(tokens[begin:end], draft) if draft else 0)))
    found = _logprobs(rows, places, tokens, runs)
    for state, run in zip(states, runs, strict=True):
        state.chose([tokens[i] for i in run])
    return [[Choice(tokens[i], *found.get(i, NO_LOGPROBS)) for i in run] for run in runs]


def _agreed(tokens: list[int], draft: list[int]) -> int:
    """How many tokens of the draft were chosen too, up to the first that was not."""
    return next((i for i, tried in enumerate(draft) if tokens[i] != tried), len(draft))


def _tokens(rows: np.ndarray, places: list[Place], likeliest: list[int]) -> list[int]:
    """The token of every place, chosen as if those of its draft before it were."""
    tokens = likeliest.copy()
    edited = [i for i, (state, _) in enumerate(places) if state.edits(likeliest[i])]
    copies = rows[edited] if edited else rows[:0]
    for copy, i in zip(copies, edited, strict=True):
        places[i][0].edit(copy, places[i][1])
        tokens[i] = int(copy.argmax())
    drawn = [i for i, (state, _) in enumerate(places) if state.generator is not None]
    _draw(copies, [(n, i) for n, i in enumerate(edited) if i in drawn], places, tokens)
    _draw(rows, [(i, i) for i in drawn if i not in edited], places, tokens)
    return tokens


def _draw(rows: np.ndarray, drawn: list[tuple[int, int]], places: list[Place], tokens: list[int]) -> None:
    """What is drawn from a row for a place, of ``drawn``, is put in place of the likeliest."""
    if not drawn:
        return
    draws = []
    for n, i in drawn:
        state, ahead = places[i]
        draws.append(Draw(n, tokens[i], state.uniform(len(ahead)), *state.filters))
    for (_, i), token in zip(drawn, draw_all(rows, draws), strict=True):
        tokens[i] = token


def _logprobs(
    rows: np.ndarray, places: list[Place], tokens: list[int], runs: list[range]
) -> dict[int, Logprobs]:
    """Those of the raw logits, for the places in ``runs`` that asked for them."""
    counts = [(i, places[i][0].params.logprobs) for run in runs for i in run]
    asked = [Asked(i, tokens[i], count) for i, count in counts if count is not None]
    return {one.row: found for one, found in zip(asked, logprobs_all(rows, asked), strict=True)}

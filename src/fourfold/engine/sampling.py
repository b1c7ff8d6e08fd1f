"""Choosing the next token of every sequence of a batch.

Order, as in vLLM: logprobs of the raw logits, then penalties, minimum length, temperature, top-k, top-p,
min-p, and one draw. A draw is one uniform number from the request's own generator, looked up in the
cumulative distribution over the vocabulary, so a seeded result depends on its own logits only, never on its
neighbours. The price is a cumulative sum over the vocabulary in float64 for each sampled row, and a sort
where top-p is on.

A request with a draft has a row for each draft token too. Row i is chosen from as if the first i draft tokens
had been chosen before, with the number that belongs to that position; it counts only if they were.
"""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch

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
        self.params = params
        # as in vLLM, ignore_eos does not lift the ban: what asks for more tokens wants text, not ends
        ends = sorted(t for t in eos | set(params.stop_token_ids) if 0 <= t < vocabulary)
        self.banned_early = torch.tensor(ends, dtype=torch.long)
        self.generated = 0
        self.generator: random.Random | None = None
        if params.temperature >= GREEDY_BELOW:
            self.generator = random.Random(None if params.seed is None else params.seed % 2**64)
        self._drawn: deque[float] = deque()  # numbers of the next positions, where drafts have asked for them
        self.counts: torch.Tensor | None = None
        if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0:
            self.counts = torch.zeros(vocabulary)
            self.in_prompt = torch.zeros(vocabulary, dtype=torch.bool)
            self.in_prompt[torch.tensor(prompt)] = True

    @property
    def edits_logits(self) -> bool:
        """Whether ``edit`` would change anything now."""
        return self.counts is not None or self.generated < self.params.min_tokens

    def edit(self, row: torch.Tensor, ahead: Sequence[int] = ()) -> None:
        """Penalties (of output; repetition: prompt too) and the ban on early ends, in place on row [V].

        ``ahead``: tokens that are taken to have been chosen since.
        """
        params = self.params
        if self.counts is not None:
            counts = self.counts
            if ahead:
                counts = counts.index_add(0, torch.tensor(ahead), torch.ones(len(ahead)))
            used = counts > 0
            repeated = used | self.in_prompt
            damped = torch.where(row > 0, row / params.repetition_penalty, row * params.repetition_penalty)
            row.copy_(torch.where(repeated, damped, row))
            row.sub_(counts, alpha=params.frequency_penalty).sub_(used.float(), alpha=params.presence_penalty)
        if self.generated + len(ahead) < params.min_tokens:
            row[self.banned_early] = NEVER

    def uniform(self, ahead: int) -> float:
        """The random number, from 0 to 1, of the position that is ``ahead`` of the next."""
        assert self.generator is not None
        while len(self._drawn) <= ahead:
            self._drawn.append(self.generator.random())
        return self._drawn[ahead]

    def chose(self, token_id: int) -> None:
        """Remember a chosen token."""
        self.generated += 1
        if self._drawn:
            self._drawn.popleft()
        if self.counts is not None:
            self.counts[token_id] += 1


@dataclass(slots=True)
class Row:
    """One row of logits: of ``state``'s request, after the tokens ``ahead`` of its draft."""

    state: SamplingState
    ahead: list[int]


def choose(
    logits: torch.Tensor,
    states: list[SamplingState],
    drafts: list[list[int]] | None = None,
    likeliest: torch.Tensor | None = None,
) -> list[list[Choice]]:
    """The next tokens of each request, from 1 + len(draft) rows of ``logits`` [.., V] (any float dtype) each.

    They are the part of the draft that would have been chosen anyway, and one more. States advance by them
    at the end: all of them or, when anything raises, none. ``likeliest`` [..] are the rows' first largest,
    where they are known already.
    """
    drafts = drafts or [[]] * len(states)
    rows = [
        Row(state, draft[:n])
        for state, draft in zip(states, drafts, strict=True)
        for n in range(len(draft) + 1)
    ]
    choices = iter(choose_rows(logits.float(), rows, likeliest))
    runs = [agreeing(list(islice(choices, len(draft) + 1)), draft) for draft in drafts]
    for state, run in zip(states, runs, strict=True):
        for choice in run:
            state.chose(choice.token_id)
    return runs


def agreeing(choices: list[Choice], draft: list[int]) -> list[Choice]:
    """The beginning of ``choices`` that is the beginning of ``draft``, and the choice after it."""
    pairs = zip(choices, draft, strict=False)
    count = next((i for i, (choice, token) in enumerate(pairs) if choice.token_id != token), len(draft))
    return choices[: count + 1]


def choose_rows(logits: torch.Tensor, rows: list[Row], likeliest: torch.Tensor | None = None) -> list[Choice]:
    """One token for each row of float32 ``logits`` [B, V]; no state advances."""
    asked = [i for i, row in enumerate(rows) if row.state.params.logprobs is not None]
    raw = logits[asked].log_softmax(-1) if asked else None
    edited = [i for i, row in enumerate(rows) if row.state.edits_logits]
    if edited:
        logits = logits.clone()
        for i in edited:
            rows[i].state.edit(logits[i], rows[i].ahead)
    tokens = logits.argmax(-1) if likeliest is None or edited else likeliest.long()
    drawn = [i for i, row in enumerate(rows) if row.state.generator is not None]
    if drawn:
        tokens[drawn] = draw(logits if len(drawn) == len(rows) else logits[drawn], [rows[i] for i in drawn])
    choices = [Choice(token) for token in tokens.tolist()]
    if raw is not None:
        add_logprobs([choices[i] for i in asked], [rows[i].state for i in asked], raw)
    return choices


def draw(logits: torch.Tensor, rows: list[Row]) -> torch.Tensor:
    """Sample one token from each row [B, V] at its temperature, inside its top-k, top-p and min-p."""
    params = [row.state.params for row in rows]
    logits = logits / torch.tensor([[p.temperature] for p in params])
    for keep, kept in (
        (keep_top_k, [i for i, p in enumerate(params) if 0 < p.top_k < logits.shape[-1]]),
        (keep_top_p, [i for i, p in enumerate(params) if p.top_p < 1.0]),
        (keep_min_p, [i for i, p in enumerate(params) if p.min_p > 0.0]),
    ):
        if kept:
            logits[kept] = keep(logits[kept], [params[i] for i in kept])
    cumulative = logits.softmax(-1).double().cumsum(-1)
    uniform = torch.tensor([row.state.uniform(len(row.ahead)) for row in rows], dtype=torch.float64)
    target = uniform.unsqueeze(1) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return drawn.clamp_(max=logits.shape[-1] - 1)  # a row of NaN finds no place


def keep_top_k(logits: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """Only the k likeliest tokens, and those tied with the k-th."""
    largest = logits.topk(max(p.top_k for p in params), -1).values
    kth = largest.gather(1, torch.tensor([[p.top_k - 1] for p in params]))
    return logits.masked_fill(logits < kth, NEVER)


def keep_top_p(logits: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """The fewest likeliest tokens whose probabilities sum to at least p; always the likeliest one."""
    probabilities, order = logits.softmax(-1).sort(stable=True, dim=-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    dropped = before >= torch.tensor([[p.top_p] for p in params])
    dropped[:, 0] = False
    return logits.masked_fill(torch.empty_like(dropped).scatter_(1, order, dropped), NEVER)


def keep_min_p(logits: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """Tokens at least min_p times as likely as the likeliest."""
    probabilities = logits.softmax(-1)
    least = probabilities.amax(-1, keepdim=True) * torch.tensor([[p.min_p] for p in params])
    return logits.masked_fill(probabilities < least, NEVER)


def add_logprobs(choices: list[Choice], states: list[SamplingState], raw: torch.Tensor) -> None:
    """Fill in the chosen token's and the likeliest tokens' entries of ``raw`` [B, V]."""
    most = min(max(state.params.logprobs or 0 for state in states), raw.shape[-1])
    values, indices = (part.tolist() for part in raw.topk(most, -1))
    for row, (choice, state) in enumerate(zip(choices, states, strict=True)):
        asked = state.params.logprobs or 0
        choice.logprob = raw[row, choice.token_id].item()
        choice.top_logprobs = list(zip(indices[row][:asked], values[row][:asked], strict=True))

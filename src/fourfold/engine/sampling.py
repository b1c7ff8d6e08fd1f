"""Choosing the next token of every sequence of a batch.

Order, as in vLLM: logprobs of the raw logits, then penalties, minimum length, temperature, top-k, top-p,
min-p, and one draw. A draw is one uniform number from the request's own generator, looked up in the
cumulative distribution over the vocabulary, so a seeded result depends on its own logits only, never on its
neighbours. The price is a cumulative sum over the vocabulary in float64 for each sampled row, and a sort
where top-p is on.
"""

from dataclasses import dataclass

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
        self.generator: torch.Generator | None = None
        if params.temperature >= GREEDY_BELOW:
            self.generator = torch.Generator()
            self.generator.seed() if params.seed is None else self.generator.manual_seed(params.seed)
        self.counts: torch.Tensor | None = None
        if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0:
            self.counts = torch.zeros(vocabulary)
            self.in_prompt = torch.zeros(vocabulary, dtype=torch.bool)
            self.in_prompt[torch.tensor(prompt)] = True

    @property
    def edits_logits(self) -> bool:
        """Whether ``edit`` would change anything now."""
        return self.counts is not None or self.generated < self.params.min_tokens

    def edit(self, row: torch.Tensor) -> None:
        """Penalties (of output; repetition: prompt too) and the ban on early ends, in place on row [V]."""
        params = self.params
        if self.counts is not None:
            used = self.counts > 0
            repeated = used | self.in_prompt
            damped = torch.where(row > 0, row / params.repetition_penalty, row * params.repetition_penalty)
            row.copy_(torch.where(repeated, damped, row))
            row.sub_(self.counts, alpha=params.frequency_penalty).sub_(
                used.float(), alpha=params.presence_penalty
            )
        if self.generated < params.min_tokens:
            row[self.banned_early] = NEVER

    def chose(self, token_id: int) -> None:
        """Remember a chosen token."""
        self.generated += 1
        if self.counts is not None:
            self.counts[token_id] += 1


def choose(logits: torch.Tensor, states: list[SamplingState]) -> list[Choice]:
    """One token for each row of ``logits`` [B, V] (any float dtype), advancing ``states`` [B].

    Counts advance last, for all rows or, when anything raises, for none.
    """
    logits = logits.float()
    asked = [i for i, state in enumerate(states) if state.params.logprobs is not None]
    raw = logits[asked].log_softmax(-1) if asked else None
    edited = [i for i, state in enumerate(states) if state.edits_logits]
    if edited:
        logits = logits.clone()
        for i in edited:
            states[i].edit(logits[i])
    tokens = logits.argmax(-1)
    drawn = [i for i, state in enumerate(states) if state.generator is not None]
    if drawn:
        rows = logits if len(drawn) == len(states) else logits[drawn]
        tokens[drawn] = draw(rows, [states[i] for i in drawn])
    choices = [Choice(token) for token in tokens.tolist()]
    if raw is not None:
        add_logprobs([choices[i] for i in asked], [states[i] for i in asked], raw)
    for choice, state in zip(choices, states, strict=True):
        state.chose(choice.token_id)
    return choices


def draw(logits: torch.Tensor, states: list[SamplingState]) -> torch.Tensor:
    """Sample one token from each row [B, V] at its temperature, inside its top-k, top-p and min-p."""
    params = [state.params for state in states]
    logits = logits / torch.tensor([[p.temperature] for p in params])
    for keep, rows in (
        (keep_top_k, [i for i, p in enumerate(params) if 0 < p.top_k < logits.shape[-1]]),
        (keep_top_p, [i for i, p in enumerate(params) if p.top_p < 1.0]),
        (keep_min_p, [i for i, p in enumerate(params) if p.min_p > 0.0]),
    ):
        if rows:
            logits[rows] = keep(logits[rows], [params[i] for i in rows])
    cumulative = logits.softmax(-1).double().cumsum(-1)
    uniform = [torch.rand((), dtype=torch.float64, generator=state.generator) for state in states]
    target = torch.stack(uniform).unsqueeze(1) * cumulative[:, -1:]
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

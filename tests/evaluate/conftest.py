"""A language model whose perplexity and divergences are known exactly: a Markov chain over letters."""

from dataclasses import dataclass

import numpy as np
import pytest

from fourfold.core.records import ModelCard

ALPHABET = "abcdefghijklmnop"


@dataclass
class MarkovModel:
    """P(next letter | letter) is a row of ``transitions`` [V, V]; the logits carry an arbitrary offset."""

    transitions: np.ndarray
    name: str = "markov"
    max_positions: int = 4096

    @property
    def card(self) -> ModelCard:
        size = self.transitions.size
        return ModelCard(
            name=self.name,
            architecture="markov",
            parameters=size,
            weight_format="fp64",
            size_bytes=8 * size,
            bits_per_weight=64.0,
        )

    def encode(self, text: str) -> list[int]:
        return [ALPHABET.index(letter) for letter in text]

    def logits(self, token_ids: list[int]) -> np.ndarray:
        offsets = np.arange(len(token_ids))[:, None] % 7  # softmax must not care
        return (np.log(self.transitions[token_ids]) + offsets).astype(np.float32)

    def stationary(self) -> np.ndarray:
        values, vectors = np.linalg.eig(self.transitions.T)
        pi = np.real(vectors[:, np.argmax(np.real(values))])
        return pi / pi.sum()

    def sample(self, length: int, rng: np.random.Generator) -> str:
        cumulative = self.transitions.cumsum(axis=1)
        state = int(rng.choice(len(cumulative), p=self.stationary()))
        letters = []
        for draw in rng.random(length):
            letters.append(ALPHABET[state])
            state = min(int(np.searchsorted(cumulative[state], draw)), len(cumulative) - 1)
        return "".join(letters)


@dataclass(frozen=True)
class Truth:
    """What evaluation must find, from the closed form."""

    perplexity: float
    perplexity_base: float
    kl_divergence: float
    top1_agreement: float

    @property
    def perplexity_ratio(self) -> float:
        return self.perplexity / self.perplexity_base


@pytest.fixture(scope="session")
def markov_truth(markov_pair) -> Truth:
    """The expectation over text that the base itself writes."""
    model, base = markov_pair
    pi, P, Q = base.stationary(), base.transitions, model.transitions
    weights = pi[:, None] * P
    return Truth(
        perplexity=float(np.exp(-(weights * np.log(Q)).sum())),
        perplexity_base=float(np.exp(-(weights * np.log(P)).sum())),
        kl_divergence=float((weights * np.log(P / Q)).sum()),
        top1_agreement=float(pi[P.argmax(axis=1) == Q.argmax(axis=1)].sum()),
    )


@pytest.fixture(scope="session")
def markov_pair() -> tuple[MarkovModel, MarkovModel]:
    """(model, base): the base writes long easy and long hard stretches, so that neighbouring tokens hang
    together; the model is the base with some noise, far more of it on the hard half."""
    rng = np.random.default_rng(5)
    V, half = len(ALPHABET), len(ALPHABET) // 2
    easy = rng.dirichlet(np.full(half, 0.2), size=half)
    hard = rng.dirichlet(np.full(half, 5.0), size=half)
    stay, leave = 0.97, 0.03
    P = np.full((V, V), leave / half)
    P[:half, :half] = stay * easy
    P[half:, half:] = stay * hard
    P = (P + 1e-4) / (P + 1e-4).sum(axis=1, keepdims=True)
    noise = rng.normal(scale=np.repeat([0.05, 0.4], half)[:, None], size=(V, V))
    Q = P * np.exp(noise)
    Q /= Q.sum(axis=1, keepdims=True)
    return MarkovModel(Q, "noisy"), MarkovModel(P, "chain")

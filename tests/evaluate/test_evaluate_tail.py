"""The loss on rare tokens: which tokens those are, and that it sees what the mean loss hides."""

from dataclasses import replace

import numpy as np
import pytest

from fourfold.evaluate import evaluate
from fourfold.evaluate.rarity import TAIL, rarity_ranks


def test_ranks_by_hand():
    """5 stands once, 7 once and has the larger id, 3 three times, 1 five times."""
    text = [1, 1, 3, 7, 1, 3, 5, 1, 3, 1]
    ranks = rarity_ranks(np.array([1, 3, 5, 7]), [text])
    assert ranks.tolist() == [0.875, 0.625, 0.375, 0.125]


def test_frequency_is_counted_in_all_of_all_texts_and_not_in_what_is_scored():
    scored = np.array([2, 2, 2, 9])
    assert rarity_ranks(scored, [[2, 2, 2], [9]]).tolist() == [0.625, 0.625, 0.625, 0.125]
    assert rarity_ranks(scored, [[2, 2, 2], [9, 9, 9, 9]]).tolist() == [0.375, 0.375, 0.375, 0.875]


def test_the_tail_is_whole_kinds_and_near_a_tenth():
    rng = np.random.default_rng(2)
    ids = rng.zipf(1.4, size=5000) % 400
    ranks = rarity_ranks(ids, [ids.tolist()])
    tail = ranks < TAIL
    rarest_outside, commonest_inside = (
        min(np.sum(ids == kind) for kind in set(ids[~tail])),
        max(np.sum(ids == kind) for kind in set(ids[tail])),
    )
    assert commonest_inside <= rarest_outside
    assert abs(tail.mean() - TAIL) <= rarest_outside / len(ids) / 2
    assert not set(ids[tail]) & set(ids[~tail])


@pytest.fixture(scope="module")
def text(markov_pair) -> str:
    return markov_pair[1].sample(4000, np.random.default_rng(8))


def test_figures_equal_the_formulas(markov_pair, text):
    model, base = markov_pair
    overall = evaluate(model, base, {"t": text}, window_tokens=100).overall
    ids = np.array(base.encode(text))
    windows = ids.reshape(-1, 100)
    here, there = windows[:, :-1].ravel(), windows[:, 1:].ravel()
    tail = rarity_ranks(there, [ids.tolist()]) < TAIL
    loss = -np.log(model.transitions[here, there])[tail]
    loss_base = -np.log(base.transitions[here, there])[tail]
    assert overall.tail_tokens == tail.sum()
    assert overall.tail_loss.value == pytest.approx(loss.mean(), rel=1e-5)
    assert overall.tail_loss_base.value == pytest.approx(loss_base.mean(), rel=1e-5)
    assert overall.tail_loss_increase.value == pytest.approx((loss - loss_base).mean(), rel=1e-4)
    assert overall.tail_loss_increase.low < overall.tail_loss_increase.value < overall.tail_loss_increase.high


def test_damage_to_rare_tokens_alone_shows_in_the_tail(markov_pair, text):
    _, base = markov_pair
    counts = np.bincount(base.encode(text), minlength=16)
    damped = base.transitions.copy()
    damped[:, counts.argsort()[:2]] *= 0.2
    damaged = replace(base, transitions=damped / damped.sum(axis=1, keepdims=True))
    overall = evaluate(damaged, base, {"t": text}, window_tokens=100).overall
    assert overall.tail_loss_increase.low > 0.2
    assert overall.perplexity_ratio.value < 1.05


def test_without_a_base_there_is_no_increase(markov_pair, text):
    overall = evaluate(markov_pair[0], None, {"t": text}, window_tokens=100).overall
    assert overall.tail_loss is not None and overall.tail_loss_increase is None


def test_a_text_without_rare_tokens_says_so(markov_pair):
    """Rarity is over all texts: one that holds common tokens only has no tail of its own."""
    _, base = markov_pair
    texts = {"plain": "ab" * 300, "mixed": "ab" * 250 + "cdefghijkl" * 10}
    record = evaluate(base, base, texts, window_tokens=100)
    assert record.texts["plain"].tail_tokens == 0 and record.texts["plain"].tail_loss is None
    assert record.overall.tail_loss_increase.value == 0

"""Loss by position: against formulas, and on an engine whose context is held in few bits."""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest

from fourfold.core.errors import FourfoldError, UsageError
from fourfold.engine import Engine, EngineConfig
from fourfold.evaluate import default_texts, evaluate
from fourfold.evaluate.tasks.longcontext import buckets


@dataclass
class Forgetful:
    """The base, but after ``memory`` tokens it forgets its chain and says the stationary distribution."""

    inner: object
    memory: int

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def logits(self, token_ids):
        logits = self.inner.logits(token_ids)
        logits[self.memory :] = np.log(self.inner.stationary())
        return logits


@pytest.fixture(scope="module")
def text(markov_pair) -> str:
    return markov_pair[1].sample(4000, np.random.default_rng(4))


def test_buckets_cover_every_position_once():
    assert buckets(512) == [(1, 32), (32, 64), (64, 128), (128, 256), (256, 512)]
    assert buckets(20) == [(1, 20)] and buckets(100)[-1] == (64, 100)
    for length in (2, 32, 33, 1000):
        assert [p for a, b in buckets(length) for p in range(a, b)] == list(range(1, length))


def test_a_model_that_forgets_loses_where_it_forgets(markov_pair, text):
    _, base = markov_pair
    record = evaluate(
        Forgetful(base, 64),
        base,
        {"t": text},
        task="longcontext",
        window_tokens=256,
        max_tokens_per_text=None,
    )
    near, at_edge, far = record.positions[0], record.positions[1], record.positions[-1]
    assert (near.start, near.end, far.start, far.end) == (1, 32, 128, 256)
    assert near.loss_increase.value == at_edge.loss_increase.value == 0
    assert far.loss_increase.low > 0.3
    pieces = [base.encode(text)[i : i + 256] for i in range(0, 3840, 256)]
    pairs = [pair for ids in pieces for pair in list(pairwise(ids))[127:]]
    here, there = np.array(pairs).T
    assert far.tokens == len(pairs)
    assert far.loss_base.value == pytest.approx(-np.log(base.transitions[here, there]).mean(), rel=1e-5)
    assert far.loss.value == pytest.approx(-np.log(base.stationary()[there]).mean(), rel=1e-5)
    assert record.overall.perplexity_ratio.value > 1.2 and record.overall.kl_divergence is None


def test_texts_of_one_window_each_are_one_sample(markov_pair, text):
    texts = {"a": text[:300], "b": text[1000:1300], "c": text[2000:2300]}
    record = evaluate(*markov_pair, texts, task="longcontext", window_tokens=256, max_tokens_per_text=None)
    assert record.overall.windows == 3 and record.texts == {}
    assert record.positions[-1].loss.low < record.positions[-1].loss.value < record.positions[-1].loss.high


def test_by_itself_it_takes_the_longest_window_that_model_and_texts_hold(markov_pair, text):
    def window(model, texts):
        return evaluate(model, None, texts, task="longcontext", max_tokens_per_text=None).window_tokens

    assert window(replace(markov_pair[0], max_positions=1000), {"a": text}) == 1000
    assert window(markov_pair[0], {"a": text[:1500], "b": text[:1100]}) == 1024
    assert window(markov_pair[0], {"a": text[:1500]}) == 512  # alone, it must hold two


def test_one_window_in_all_and_too_short_texts_are_refused(markov_pair, text):
    with pytest.raises(FourfoldError, match=r"single window.*--window-tokens"):
        evaluate(*markov_pair, {"a": text[:300]}, task="longcontext", window_tokens=256)
    with pytest.raises(FourfoldError, match="no long context"):
        evaluate(*markov_pair, {"a": text[:100]}, task="longcontext")
    with pytest.raises(UsageError, match="at most 4096"):
        evaluate(*markov_pair, {"a": text}, task="longcontext", window_tokens=5000)


def test_a_cache_of_four_bits_is_in_the_figures(tiny_llama):
    """The engine's logits go through the cache's format, so the task needs to know nothing of it."""
    config = EngineConfig(threads=1, kv_cache_tokens=64, dtype="float32")
    base = Engine.load(tiny_llama, config)
    quantized = Engine.load(tiny_llama, config.model_copy(update={"kv_cache": "mxfp4"}))
    [text] = [t for name, t in default_texts().items() if name == "opticks"]
    texts = {"t": text.encode("ascii", "ignore").decode()[:1024]}
    record = evaluate(quantized, base, texts, task="longcontext", window_tokens=256, max_tokens_per_text=None)
    same = evaluate(base, base, texts, task="longcontext", window_tokens=256, max_tokens_per_text=None)
    assert record.model.kv_cache_format == "mxfp4" and record.base.kv_cache_format is None
    assert all(p.loss_increase.value != 0 for p in record.positions)
    assert all(p.loss_increase.value == p.loss_increase.high == 0 for p in same.positions)

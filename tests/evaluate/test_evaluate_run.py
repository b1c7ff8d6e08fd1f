"""The record as a whole: exact figures, equal windows, and one clear error for each thing that cannot be."""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest

from fourfold.core.errors import FourfoldError, UsageError
from fourfold.core.records import EvaluationRecord
from fourfold.evaluate import default_texts, evaluate, read_texts, task_names
from fourfold.evaluate.scores import score_window
from fourfold.evaluate.windows import cut


@pytest.fixture(scope="module")
def text(markov_pair) -> str:
    return markov_pair[1].sample(1000, np.random.default_rng(3))


def test_figures_equal_the_formulas_on_the_same_windows(markov_pair, text):
    model, base = markov_pair
    record = evaluate(model, base, {"t": text}, window_tokens=100)
    pairs = [
        (a, b)
        for start in range(0, 1000, 100)
        for ids in [base.encode(text[start : start + 100])]
        for a, b in pairwise(ids)
    ]
    here, there = np.array(pairs).T
    P, Q = base.transitions, model.transitions
    overall = record.overall
    assert overall.tokens == 990 and overall.windows == 10
    assert overall.perplexity.value == pytest.approx(np.exp(-np.log(Q[here, there]).mean()), rel=1e-5)
    assert overall.perplexity_base.value == pytest.approx(np.exp(-np.log(P[here, there]).mean()), rel=1e-5)
    assert overall.perplexity_ratio.value == pytest.approx(
        overall.perplexity.value / overall.perplexity_base.value, rel=1e-6
    )
    divergence = (P * np.log(P / Q)).sum(axis=1)[here].mean()
    assert overall.kl_divergence.value == pytest.approx(divergence, rel=1e-4)
    assert overall.top1_agreement.value == pytest.approx((P.argmax(1) == Q.argmax(1))[here].mean())


def test_a_model_is_no_distance_from_itself(markov_pair, text):
    overall = evaluate(markov_pair[0], markov_pair[0], {"t": text}, window_tokens=100).overall
    assert overall.kl_divergence.value == overall.kl_divergence.high == 0
    assert overall.top1_agreement.value == 1
    assert overall.perplexity == overall.perplexity_base
    assert (overall.perplexity_ratio.low, overall.perplexity_ratio.high) == (1, 1)


def test_overall_weighs_texts_by_tokens(markov_pair, text):
    record = evaluate(*markov_pair, {"long": text, "short": text[:200]}, window_tokens=100)
    parts = record.texts.values()
    mean = sum(q.tokens * np.log(q.perplexity.value) for q in parts) / sum(q.tokens for q in parts)
    assert record.overall.perplexity.value == pytest.approx(np.exp(mean))
    assert record.overall.tokens == sum(q.tokens for q in parts)


def test_the_record_survives_json_and_repeats_exactly(markov_pair, text):
    record = evaluate(*markov_pair, {"t": text}, window_tokens=64)
    assert EvaluationRecord.model_validate_json(record.model_dump_json()) == record
    again = evaluate(*markov_pair, {"t": text}, window_tokens=64)
    assert again.overall == record.overall and again.texts == record.texts


def test_without_a_base_only_perplexity_is_told(markov_pair, text):
    overall = evaluate(markov_pair[0], None, {"t": text}, window_tokens=100).overall
    assert overall.perplexity.value > 1
    assert overall.perplexity_base is overall.kl_divergence is overall.top1_agreement is None


def test_progress_counts_every_window(markov_pair, text):
    seen: list[tuple[int, int]] = []
    evaluate(
        *markov_pair, {"a": text, "b": text}, window_tokens=250, progress=lambda *counts: seen.append(counts)
    )
    assert seen == [(i, 8) for i in range(1, 9)]


def test_windows_are_spread_over_the_whole_text():
    pieces = cut("t", list(range(1009)), 100, 300)
    assert [piece[0] for piece in pieces] == [0, 300, 600]
    assert all(len(piece) == 100 for piece in pieces)
    assert [piece[0] for piece in cut("t", list(range(250)), 100, None)] == [0, 100]


def test_a_text_of_less_than_two_windows_is_refused(markov_pair, text):
    with pytest.raises(FourfoldError, match=r"'tiny' has 199 tokens.*--window-tokens"):
        evaluate(*markov_pair, {"tiny": text[:199]}, window_tokens=100)


def test_a_window_longer_than_the_model_takes_is_refused(markov_pair, text):
    short = replace(markov_pair[0], max_positions=64)
    with pytest.raises(UsageError, match="at most 64"):
        evaluate(short, None, {"t": text}, window_tokens=100)


def test_no_text_is_refused(markov_pair):
    with pytest.raises(UsageError, match="no text"):
        evaluate(*markov_pair, {})


@dataclass
class Reversed:
    """A model with another tokenizer: the same letters, other numbers."""

    inner: object

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def encode(self, text: str) -> list[int]:
        return [15 - i for i in self.inner.encode(text)]


def test_models_that_cut_a_text_differently_are_refused(markov_pair, text):
    with pytest.raises(FourfoldError, match="different tokens"):
        evaluate(markov_pair[0], Reversed(markov_pair[1]), {"t": text}, window_tokens=100)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_named(markov_pair, poison):
    with np.errstate(divide="ignore", invalid="ignore"):
        broken = replace(markov_pair[0], transitions=markov_pair[0].transitions.copy(), name="broken")
        broken.transitions[3, 5] = np.exp(poison)
        with pytest.raises(FourfoldError, match=r"'broken'.*not finite.*token 2"):
            score_window([1, 2, 3, 4], broken, None)


def test_vocabularies_that_differ_are_refused(markov_pair):
    wide = replace(markov_pair[0], transitions=np.full((16, 18), 1 / 18), name="wide")
    with pytest.raises(FourfoldError, match="18 logits and its base 16"):
        score_window([1, 2, 3], wide, markov_pair[1])


def test_the_texts_of_the_package_are_there_and_long_enough():
    texts = default_texts()
    assert set(texts) == {"opticks", "python-reference", "python-source"}
    assert all(30_000 < len(text.encode()) < 45_000 for text in texts.values())


def test_files_become_texts_by_their_stems(tmp_path):
    (tmp_path / "a").mkdir()
    for path in ("x.txt", "a/x.txt", "y.md"):
        (tmp_path / path).write_text(path)
    texts = read_texts([tmp_path / "x.txt", tmp_path / "a/x.txt", tmp_path / "y.md"])
    assert texts == {str(tmp_path / "x.txt"): "x.txt", str(tmp_path / "a/x.txt"): "a/x.txt", "y": "y.md"}


def test_a_text_that_cannot_be_read_is_one_error(tmp_path):
    with pytest.raises(UsageError, match="nowhere"):
        read_texts([tmp_path / "nowhere.txt"])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(FourfoldError, match="not UTF-8"):
        read_texts([tmp_path / "latin.txt"])


def test_the_registry_lists_the_task_and_refuses_others(markov_pair, text):
    assert task_names() == ["heldout", "humaneval", "lm-eval", "longcontext"]
    with pytest.raises(UsageError, match=r"Unknown evaluation task.*heldout"):
        evaluate(*markov_pair, {"t": text}, task="arc")

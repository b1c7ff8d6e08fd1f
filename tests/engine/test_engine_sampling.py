"""Each sampling parameter does what it says, on logits made for the purpose and through the engine."""

import math
from collections import Counter

import pytest
import torch
from engine_models import continue_all, drain, greedy, load, prompt
from scipy.stats import chisquare

from fourfold.engine import Request, SamplingParams
from fourfold.engine.sampling import Choice, SamplingState
from fourfold.engine.sampling import choose as choose_runs

VOCABULARY = 12
LOGITS = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1)) * 1.5
EOS = {0}


def state(history: tuple[int, ...] = (), before: tuple[int, ...] = (1,), **params) -> SamplingState:
    result = SamplingState(SamplingParams(**params), list(before), VOCABULARY, EOS)
    result.chose(history)
    return result


def choose(logits: torch.Tensor, states: list[SamplingState]) -> list[Choice]:
    """One token for each state: without drafts there is no more."""
    (runs,) = zip(*choose_runs(logits, states), strict=True)
    return list(runs)


def sample(count: int, logits: torch.Tensor = LOGITS, **params) -> Counter[int]:
    """Tokens of ``count`` seeded requests in one batch."""
    states = [state(seed=seed, **params) for seed in range(count)]
    return Counter(choice.token_id for choice in choose(logits.repeat(count, 1), states))


def assert_follows(counts: Counter[int], probabilities: torch.Tensor) -> None:
    """Nothing outside the support, and no surprise inside it at the level of 1 in 1000."""
    support = [i for i in range(VOCABULARY) if probabilities[i] > 0]
    assert set(counts) <= set(support)
    total = counts.total()
    if len(support) == 1:
        return
    expected = probabilities[support].double() * total / probabilities[support].double().sum()
    assert chisquare([counts[i] for i in support], expected.tolist()).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_follow_the_tempered_softmax(temperature):
    assert_follows(sample(4000, temperature=temperature), (LOGITS / temperature).softmax(-1))


def test_a_wrong_distribution_would_be_noticed():
    with pytest.raises(AssertionError):
        assert_follows(sample(4000, temperature=1.0), (LOGITS / 1.2).softmax(-1))


@pytest.mark.parametrize("k", [1, 3, 12, 50])
def test_top_k(k):
    kept = LOGITS.topk(min(k, VOCABULARY)).indices
    expected = torch.zeros(VOCABULARY).scatter(0, kept, LOGITS.softmax(-1)[kept])
    assert_follows(sample(1500, top_k=k), expected)


@pytest.mark.parametrize("k", [0, -1])
def test_top_k_off_keeps_all(k):
    assert_follows(sample(1500, top_k=k), LOGITS.softmax(-1))


@pytest.mark.parametrize("p", [1e-300, 0.01, 0.5, 0.9])
def test_top_p_keeps_the_fewest_that_reach_p(p):
    probabilities, order = LOGITS.softmax(-1).sort(descending=True)
    count = int((probabilities.cumsum(0) < p).sum()) + 1
    expected = torch.zeros(VOCABULARY).scatter(0, order[:count], probabilities[:count])
    assert_follows(sample(1500, top_p=p), expected)


@pytest.mark.parametrize("p", [0.05, 0.4, 1.0])
def test_min_p_is_relative_to_the_likeliest(p):
    probabilities = LOGITS.softmax(-1)
    expected = probabilities * (probabilities >= p * probabilities.max())
    assert_follows(sample(1500, min_p=p), expected)


def test_filters_of_one_row_do_not_touch_its_neighbours():
    rows = [{"top_k": 1}, {"top_p": 0.01}, {"min_p": 1.0}, {"temperature": 0}, {}]
    together = Counter()
    for seed in range(100):
        states = [state(seed=seed, **row) for row in rows]
        choices = choose(LOGITS.repeat(len(rows), 1), states)
        assert [c.token_id for c in choices[:4]] == [int(LOGITS.argmax())] * 4
        together[choices[4].token_id] += 1
    assert len(together) > 5
    assert together == sample(100)


def test_greedy_takes_the_likeliest():
    assert sample(5, temperature=0) == sample(5, temperature=1e-9) == {int(LOGITS.argmax()): 5}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_row_still_gives_a_token_of_the_vocabulary(value):
    broken = LOGITS.clone()
    broken[4] = value
    fine, strange = choose(torch.stack([LOGITS, broken]), [state(seed=1), state(seed=2, top_p=0.9)])
    assert fine.token_id == choose(LOGITS[None], [state(seed=1)])[0].token_id
    assert 0 <= strange.token_id < VOCABULARY


def first_choice_shift(**params) -> torch.Tensor:
    """By how much parameters move each logit, after output 3, 3, 5 and a prompt of 1 and 3."""
    edited = LOGITS.clone()
    state((3, 3, 5), (1, 3), **params).edit(edited.numpy())
    return edited - LOGITS


def test_presence_penalty_is_once_per_used_output_token():
    shift = first_choice_shift(presence_penalty=0.7)
    assert {i: round(float(v), 4) for i, v in enumerate(shift) if v} == {3: -0.7, 5: -0.7}


def test_frequency_penalty_counts_uses():
    shift = first_choice_shift(frequency_penalty=0.25)
    assert {i: round(float(v), 4) for i, v in enumerate(shift) if v} == {3: -0.5, 5: -0.25}


def test_repetition_penalty_damps_prompt_and_output_towards_unlikely():
    edited = LOGITS + first_choice_shift(repetition_penalty=2.0)
    for token in range(VOCABULARY):
        factor = (0.5 if LOGITS[token] > 0 else 2.0) if token in (1, 3, 5) else 1.0
        assert edited[token] == pytest.approx(float(LOGITS[token]) * factor, abs=1e-5)


def test_min_tokens_forbids_ends_until_then():
    wants_end = LOGITS.clone()
    wants_end[[0, 7]] += 20
    early = state((3,), min_tokens=2, stop_token_ids=[7], temperature=0)
    assert choose(wants_end[None], [early])[0].token_id not in (0, 7)
    assert choose(wants_end[None], [early])[0].token_id in (0, 7)


@pytest.mark.parametrize("edits", [{"min_tokens": 5}, {"repetition_penalty": 3.0}, {}])
def test_the_largest_logit_known_beforehand_changes_nothing(edits):
    logits = torch.eye(VOCABULARY) * 2 + LOGITS.abs() / 9  # each token is the likeliest of one row
    once, again = ([state((3, 4), temperature=0, **edits) for _ in logits] for _ in range(2))
    known = [run[0] for run in choose_runs(logits, once, likeliest=logits.argmax(-1).tolist())]
    assert known == choose(logits, again)
    assert (known[0].token_id in EOS) == ("min_tokens" not in edits)


def test_logprobs_are_of_the_raw_distribution():
    logits = LOGITS[None]
    params = {"logprobs": 3, "temperature": 0.3, "presence_penalty": 2.0, "top_k": 2, "seed": 0}
    choice = choose(logits, [state((3,), **params)])[0]
    expected = LOGITS.log_softmax(-1)
    assert choice.logprob == pytest.approx(float(expected[choice.token_id]), abs=1e-6)
    values, indices = expected.topk(3)
    assert choice.top_logprobs is not None
    assert [token for token, _ in choice.top_logprobs] == indices.tolist()
    assert [value for _, value in choice.top_logprobs] == pytest.approx(values.tolist(), abs=1e-6)


def test_logprobs_asked_by_some_rows_only():
    states = [state(temperature=0), state(temperature=0, logprobs=0), state(temperature=0, logprobs=2)]
    none, chosen, two = choose(LOGITS.repeat(3, 1), states)
    assert none.logprob is None and none.top_logprobs is None
    assert chosen.logprob is not None and chosen.top_logprobs == []
    assert two.top_logprobs is not None and len(two.top_logprobs) == 2


def test_more_logprobs_than_the_vocabulary_are_all_of_it():
    choice = choose(LOGITS[None], [state(temperature=0, logprobs=100)])[0]
    assert choice.top_logprobs is not None and len(choice.top_logprobs) == VOCABULARY


@pytest.mark.parametrize("seed", [-(2**63), 2**64 - 1])
def test_the_outermost_seeds_work(seed):
    assert choose(LOGITS[None], [state(seed=seed)]) == choose(LOGITS[None], [state(seed=seed)])


def test_stop_tokens_that_the_vocabulary_has_not_are_no_matter():
    wants_end = LOGITS.clone()
    wants_end[0] += 20
    early = state(min_tokens=1, stop_token_ids=[2**70, VOCABULARY], temperature=0)
    assert choose(wants_end[None], [early])[0].token_id != 0


def test_bfloat16_logits_are_taken():
    assert choose(LOGITS.bfloat16()[None], [state(temperature=0)])[0].token_id == int(LOGITS.argmax())


def test_a_seed_decides_whatever_runs_beside_it(tiny_llama):
    params = SamplingParams(seed=11, max_tokens=25, ignore_eos=True, top_p=0.9, top_k=100)
    alone = continue_all(load(tiny_llama), [prompt(9)], params)[0]
    engine = load(tiny_llama)
    engine.add(Request("it", prompt(9), params))
    for number in range(5):
        others = SamplingParams(max_tokens=20, ignore_eos=True, temperature=0.7, seed=number)
        engine.add(Request(f"other {number}", prompt(30, seed=number), others))
    outputs = drain(engine)
    assert [output.token_id for output in outputs if output.request_id == "it"] == alone
    again = continue_all(load(tiny_llama), [prompt(9)], params.model_copy(update={"seed": 12}))[0]
    assert again != alone


def test_without_a_seed_runs_differ(tiny_llama):
    engine = load(tiny_llama)
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    assert len({tuple(continue_all(engine, [prompt(9)], params)[0]) for _ in range(3)}) == 3


def test_engine_logprobs_are_log_softmax_of_its_logits(tiny_llama):
    engine = load(tiny_llama)
    params = greedy(10, logprobs=4, presence_penalty=1.0)
    done = engine.generate([prompt(20)], params)[0]
    logits = torch.from_numpy(engine.logits(prompt(20) + done.token_ids))[19:-1]
    expected = logits.log_softmax(-1)
    assert done.logprobs is not None and done.top_logprobs is not None
    for row, token, value, top in zip(
        expected, done.token_ids, done.logprobs, done.top_logprobs, strict=True
    ):
        assert value == pytest.approx(float(row[token]), abs=1e-4)
        assert [v for _, v in top] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)
        assert math.isclose(sum(map(math.exp, row.tolist())), 1, rel_tol=1e-4)

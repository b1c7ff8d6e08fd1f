"""Drafts change how many steps an answer takes, never a token of it."""

import random
from collections import Counter

import pytest
import torch
from engine_models import continue_all, drain, greedy, load, prompt
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import chisquare

from fourfold.engine import Completion, EngineConfig, Request, SamplingParams
from fourfold.engine.kv_cache import BlockTable
from fourfold.engine.sampling import SamplingState, choose
from fourfold.engine.sequence import Sequence
from fourfold.engine.speculation import Lookup, worthwhile

SIZES = range(1, 4)
PROMPTS = [prompt(n, seed=n) * 2 for n in (3, 40, 17, 1, 60)]
ALWAYS = 0.0  # a chance that every draft has


class Oracle:
    """Drafts for one engine from answers that are known already, each token wrong with some probability."""

    def __init__(self, monkeypatch, answers: dict[str, list[int]], wrong: float):
        self.answers, self.wrong, self.rng = answers, wrong, random.Random(0)
        monkeypatch.setattr(Sequence, "propose", lambda sequence, most, chance: self.propose(sequence, most))

    def propose(self, sequence: Sequence, most: int) -> list[int]:
        said = len(sequence.tokens) - len(sequence.request.prompt_token_ids)
        most = min(most, sequence.length_limit - len(sequence.tokens) - 1)
        draft = self.answers[sequence.request.request_id][said : said + self.rng.randrange(most + 1)]
        return [self.rng.randrange(256) if self.rng.random() < self.wrong else token for token in draft]


@pytest.fixture(scope="module")
def alone(tiny_llama):
    """What follows each prompt without drafts."""
    return continue_all(load(tiny_llama), PROMPTS, greedy(40))


# what is looked up


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(0, 12))
def test_a_draft_is_what_followed_the_same_tokens_before(tokens, most):
    grown = tokens[: len(tokens) // 2 + 1]
    lookup = Lookup(grown, SIZES)
    for token in tokens[len(grown) :]:
        lookup.propose(most, ALWAYS)
        grown.append(token)
    draft = lookup.propose(most, ALWAYS)
    seen = tokens[-1] in tokens[:-1]
    assert len(draft) == (most if seen else 0)
    text = tokens + draft
    for end in range(len(tokens), len(text)):  # each token followed its left neighbour before
        assert text[end - 1 : end + 1] in [text[i : i + 2] for i in range(end - 1)]


def test_the_longest_match_wins_and_then_the_latest():
    assert Lookup([1, 2, 3, 4, 9, 3, 5, 1, 2, 3], SIZES).propose(1, ALWAYS) == [4]
    assert Lookup([3, 4, 3, 5, 3], SIZES).propose(1, ALWAYS) == [5]
    assert Lookup([3, 4, 3, 5, 3], range(2, 4)).propose(1, ALWAYS) == []


def test_a_loop_is_followed_beyond_its_end():
    assert Lookup([7, 1, 2, 1, 2], SIZES).propose(5, ALWAYS) == [1, 2, 1, 2, 1]


def test_text_without_repetition_soon_has_no_drafts():
    """The worst text: every token stood before, and never does the same follow."""
    tokens = list(range(50))
    lookup, rng, proposed = Lookup(tokens, SIZES), random.Random(1), 0
    for _ in range(400):
        proposed += len(lookup.propose(8, worthwhile(1)))
        tokens.append(rng.randrange(50))
    assert proposed < 400 * 0.03


def test_text_that_begins_to_repeat_gets_its_drafts_back():
    rng = random.Random(1)
    tokens = [rng.randrange(50) for _ in range(2)]
    lookup = Lookup(tokens, SIZES)
    for _ in range(300):
        lookup.propose(8, worthwhile(1))
        tokens.append(rng.randrange(50))
    assert lookup.propose(8, worthwhile(1)) == []
    song, drafts = [rng.randrange(50, 90) for _ in range(30)], []
    for token in song * 4:
        drafts.append(len(lookup.propose(8, worthwhile(1))))
        tokens.append(token)
    assert sum(drafts[:30]) < 10 and sum(drafts[-30:]) > 100


def test_a_row_beside_many_others_must_be_surer():
    assert worthwhile(1) < worthwhile(8) < worthwhile(32) < 1


# what the engine makes of it


@pytest.mark.parametrize("config", [{}, {"kv_block_size": 1}, {"kv_block_size": 5, "max_batch_tokens": 24}])
def test_greedy_tokens_are_the_same_in_fewer_steps(tiny_llama, alone, config):
    plain, engine = load(tiny_llama, **config), load(tiny_llama, speculative_tokens=6, **config)
    assert continue_all(plain, PROMPTS, greedy(40)) == alone
    assert continue_all(engine, PROMPTS, greedy(40)) == alone
    assert engine.stats.steps < plain.stats.steps
    assert engine.stats.draft_tokens >= engine.stats.accepted_draft_tokens > 0
    assert engine.stats.generated_tokens == 40 * len(PROMPTS)


@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("block", [1, 4, 16])
def test_any_run_of_right_and_wrong_drafts_leaves_tokens_and_blocks_right(
    tiny_llama, alone, monkeypatch, wrong, block
):
    config = {"kv_block_size": block, "kv_cache_tokens": 320, "max_batch_tokens": 40}
    engine = load(tiny_llama, speculative_tokens=7, **config)
    answers = {str(i): tokens for i, tokens in enumerate(alone)}
    whole = [before + tokens for before, tokens in zip(PROMPTS, alone, strict=True)]
    Oracle(monkeypatch, answers, wrong)
    for index, tokens in enumerate(PROMPTS):
        engine.add(Request(str(index), tokens, greedy(40)))
    sequences, said = list(engine._sequences.values()), {key: [] for key in answers}
    while engine.has_work:
        for output in engine.step():
            said[output.request_id].append(output.token_id)
        for sequence in engine.scheduler.running:
            assert len(sequence.table.blocks) * block >= sequence.computed
            assert sequence.computed < len(sequence.tokens)
    assert said == answers
    assert {sequence.computed for sequence in sequences} == {
        len(sequence.tokens) - 1 for sequence in sequences
    } or (engine.stats.preemptions)
    assert_only_real_text_is_published(engine, whole)
    assert engine.stats.accepted_draft_tokens > 0 or wrong
    assert engine.stats.draft_tokens > 0 and engine.stats.kv_tokens_used == 0
    again = continue_all(engine, PROMPTS, greedy(40))  # on the published blocks
    assert again == alone and engine.stats.prefix_hit_tokens > 0


def assert_only_real_text_is_published(engine, texts: list[list[int]]) -> None:
    """Every digest that can be found is of the beginning of a text that was said."""
    size = engine.config.kv_block_size
    known = set()
    for text in texts:
        table = BlockTable(engine.scheduler.pool)
        known |= {table._digest(index, text) for index in range(len(text) // size)}
    assert set(engine.scheduler.pool._block_of) <= known


def test_drafts_take_only_what_budget_and_blocks_others_leave(tiny_llama, monkeypatch):
    engine = load(tiny_llama, speculative_tokens=8, max_batch_tokens=16, kv_block_size=4, kv_cache_tokens=96)
    monkeypatch.setattr(Sequence, "propose", lambda sequence, most, chance: [9] * most)
    engine.add(Request("short", prompt(4), greedy(20)))
    engine.step()
    engine.add(Request("long", prompt(40, seed=1), greedy(20)))
    for _ in range(9):  # 4 tokens of the long prompt a step leave nothing
        (chunk, read) = engine.scheduler.schedule()
        assert (chunk.count, chunk.draft, read.count) == (1, [], 4)
        engine.step()
    engine.add(Request("third", prompt(2, seed=2), greedy(20)))
    assert [c.count for c in engine.scheduler.schedule()] == [1, 4]
    engine.step()
    assert [c.count for c in engine.scheduler.schedule()] == [1, 3, 2]  # two drafts, two of prompt
    drain(engine)
    assert engine.stats.preemptions == 0 and engine.stats.draft_tokens > 0


def test_plain_decodes_come_before_those_with_drafts(tiny_llama, alone, monkeypatch):
    engine = load(tiny_llama, speculative_tokens=4)
    monkeypatch.setattr(
        Sequence, "propose", lambda s, most, chance: [9] if s.request.request_id in ("0", "2") else []
    )
    for index, tokens in enumerate(PROMPTS):
        engine.add(Request(str(index), tokens, greedy(40)))
    engine.step()
    assert [c.count for c in engine.scheduler.schedule()] == [1, 1, 1, 2, 2]


def test_preemption_while_speculating_changes_nothing(tiny_llama, alone):
    engine = load(tiny_llama, speculative_tokens=6, kv_cache_tokens=224, kv_block_size=8)
    assert continue_all(engine, PROMPTS, greedy(40)) == alone
    assert engine.stats.preemptions > 0 and engine.stats.accepted_draft_tokens > 0


# sampling with a draft


VARIED = [
    {},
    {"top_k": 8},
    {"top_p": 0.8, "temperature": 0.7},
    {"min_p": 0.05},
    {"presence_penalty": 1.5, "frequency_penalty": 0.5, "top_k": 20},
    {"repetition_penalty": 1.3, "temperature": 0.6},
    {"min_tokens": 25, "stop_token_ids": list(range(0, 256, 3))},
    {"temperature": 0, "logprobs": 3, "presence_penalty": 0.4},
    {"logprobs": 2, "top_k": 4},
]


@pytest.mark.parametrize("params", VARIED, ids=str)
def test_a_seeded_answer_is_the_same_with_drafts_and_neighbours(tiny_llama, monkeypatch, params):
    sampling = SamplingParams(**({"seed": 3, "max_tokens": 30} | params))
    plain = [load(tiny_llama).generate([tokens], sampling)[0] for tokens in PROMPTS[:3]]
    engine = load(tiny_llama, speculative_tokens=5)
    Oracle(monkeypatch, {str(i): done.token_ids for i, done in enumerate(plain)}, 0.2)
    drafted = engine.generate(PROMPTS[:3], sampling)
    for one, other in zip(plain, drafted, strict=True):
        assert_same(one, other)
    assert engine.stats.accepted_draft_tokens > 10


def assert_same(one: Completion, other: Completion) -> None:
    assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)
    assert one.logprobs == (other.logprobs and pytest.approx(other.logprobs, abs=1e-4))
    for ours, theirs in zip(one.top_logprobs or [], other.top_logprobs or [], strict=True):
        assert [token for token, _ in ours] == [token for token, _ in theirs]


LOGITS = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)) * 1.2


@pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"temperature": 0.5, "frequency_penalty": 1.0}])
@pytest.mark.parametrize("draft", [[0, 0], [3, 1], [5, 5]])
def test_tokens_after_a_draft_follow_the_distribution(params, draft):
    """First, second and third token of 1500 seeded requests against the probabilities without drafts."""
    states = [SamplingState(SamplingParams(seed=i, **params), [1], 6, {0}) for i in range(1500)]
    runs = choose(LOGITS.repeat(1500, 1), states, [draft] * 1500)
    for position in range(3):
        reached = [run for run in runs if len(run) > position]
        seen = Counter(run[position].token_id for run in reached)
        expected = plain_probabilities(position, draft, params) * len(reached)
        assert set(seen) <= set(expected.nonzero().flatten().tolist())
        likely = [i for i in range(6) if expected[i] > 5]
        rest = len(reached) - sum(seen[i] for i in likely)
        pairs = [(seen[i], float(expected[i])) for i in likely]
        pairs += [(rest, len(reached) - sum(e for _, e in pairs))] if rest else []
        scale = len(reached) / sum(e for _, e in pairs) if pairs else 1
        if len(pairs) > 1:
            assert chisquare([s for s, _ in pairs], [e * scale for _, e in pairs]).pvalue > 1e-3
        assert all(c.token_id == t for run in reached for c, t in zip(run[:position], draft, strict=False))


def plain_probabilities(position: int, draft: list[int], params: dict) -> torch.Tensor:
    """Softmax of one row after its penalties, temperature and top-k, written down once more."""
    row = LOGITS[position].double()
    for token in draft[:position]:
        row[token] -= params.get("frequency_penalty", 0.0)
    row /= params.get("temperature", 1.0)
    if "top_k" in params:
        row[row < row.topk(params["top_k"]).values[-1]] = float("-inf")
    return row.softmax(-1)


def test_sampled_pairs_of_tokens_follow_the_models_distribution(tiny_llama, monkeypatch):
    """The engine's own first two tokens, always drafted, against probabilities from whole passes."""
    tokens, params = prompt(12), {"top_k": 3, "temperature": 0.8, "max_tokens": 3, "ignore_eos": True}
    engine = load(tiny_llama, speculative_tokens=2, max_batch_size=100, max_batch_tokens=1500)
    first = top_three(engine.logits(tokens)[-1])
    pairs = {
        (a, b): p * q for a, p in first.items() for b, q in top_three(engine.logits([*tokens, a])[-1]).items()
    }
    likely = max(pairs, key=lambda pair: pairs[pair])
    monkeypatch.setattr(
        Sequence, "propose", lambda s, most, chance: list(likely)[len(s.tokens) - len(tokens) :][:most]
    )
    seen = Counter()
    for start in range(0, 900, 100):
        done = engine.generate([tokens] * 100, [SamplingParams(seed=start + i, **params) for i in range(100)])
        seen.update((d.token_ids[0], d.token_ids[1]) for d in done)
    assert set(seen) <= set(pairs) and engine.stats.accepted_draft_tokens > 200
    assert chisquare([seen[p] for p in pairs], [900 * v for v in pairs.values()]).pvalue > 1e-3


def top_three(logits) -> dict[int, float]:
    values, tokens = (torch.from_numpy(logits) / 0.8).topk(3)
    return dict(zip(tokens.tolist(), values.double().softmax(-1).tolist(), strict=True))


# ends inside a draft


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 20])
def test_max_tokens_holds(tiny_llama, alone, monkeypatch, limit):
    engine = load(tiny_llama, speculative_tokens=9)
    Oracle(monkeypatch, {str(i): tokens for i, tokens in enumerate(alone)}, 0.0)
    done = engine.generate(PROMPTS, greedy(limit))
    assert [d.token_ids for d in done] == [tokens[:limit] for tokens in alone]
    assert {d.finish_reason for d in done} == {"length"}
    assert engine.stats.generated_tokens == limit * len(PROMPTS)


def test_the_context_ends_a_draft_too(tiny_llama, alone, monkeypatch):
    tokens = prompt(505)
    plain = load(tiny_llama).generate([tokens], greedy(None))[0]
    engine = load(tiny_llama, speculative_tokens=9)
    Oracle(monkeypatch, {"0": plain.token_ids}, 0.0)
    assert_same(plain, engine.generate([tokens], greedy(None))[0])
    assert len(plain.token_ids) == 7


@pytest.mark.parametrize("end", ["stop_token_ids", "stop"])
def test_an_end_inside_an_accepted_draft_ends_there(tiny_llama, alone, monkeypatch, end):
    which, answer = next((i, a) for i, a in enumerate(alone) if len(set(a[:9])) > 3)
    engine = load(tiny_llama, speculative_tokens=9)
    value = answer[4] if end == "stop_token_ids" else engine.tokenizer.decode(answer[3:5])
    assert value, "the tokens have no text"
    params = greedy(40, **{end: [value]})
    plain = load(tiny_llama).generate([PROMPTS[which]], params)[0]
    Oracle(monkeypatch, {"0": answer}, 0.0)
    engine.add(Request("0", PROMPTS[which], params))
    outputs = drain(engine)
    assert [o.token_id for o in outputs] == plain.token_ids and len(outputs) < 10
    assert [o.finish_reason for o in outputs] == [None] * (len(outputs) - 1) + ["stop"]
    assert "".join(o.text for o in outputs) == plain.text
    assert engine.stats.generated_tokens == len(outputs) and engine.stats.kv_tokens_used == 0


def test_a_step_that_raised_can_be_repeated(tiny_llama, alone, monkeypatch):
    engine = load(tiny_llama, speculative_tokens=6)
    for index, tokens in enumerate(PROMPTS):
        engine.add(Request(str(index), tokens, greedy(40)))
    said = {str(i): [] for i in range(len(PROMPTS))}
    logits = engine.model.logits
    for number in range(1000):
        if not engine.has_work:
            break
        with monkeypatch.context() as context:
            if number % 3 == 0:
                context.setattr(engine.model, "logits", lambda hidden: logits(hidden)[:, :0])
                with pytest.raises(ValueError):
                    engine.step()
                continue
        for output in engine.step():
            said[output.request_id].append(output.token_id)
    assert list(said.values()) == alone


def test_ngram_sizes_must_be_a_range():
    with pytest.raises(ValidationError, match="speculative_max_ngram"):
        EngineConfig(speculative_min_ngram=4, speculative_max_ngram=3)

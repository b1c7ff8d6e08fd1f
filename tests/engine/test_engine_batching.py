"""However the work is cut, batched, shared or thrown away and done again, the tokens are the same."""

import pytest
from engine_models import continue_all, drain, greedy, load, prompt

from fourfold.engine import Request, SamplingParams

PROMPTS = [prompt(n, seed=n) for n in (3, 70, 17, 33, 1, 120)]


@pytest.fixture(scope="module")
def alone(tiny_llama):
    """What follows each prompt when it has the engine for itself, read in one piece, nothing shared."""
    engine = load(tiny_llama, max_batch_tokens=256, prefix_cache=False)
    return [continue_all(engine, [tokens], greedy(20))[0] for tokens in PROMPTS]


@pytest.mark.parametrize("budget", [8, 16, 64, 256])
def test_chunks_and_batches_change_nothing(tiny_llama, alone, budget):
    engine = load(tiny_llama, max_batch_tokens=budget, max_batch_size=8)
    assert continue_all(engine, PROMPTS, greedy(20)) == alone
    assert engine.stats.steps >= sum(map(len, PROMPTS)) / budget


@pytest.mark.parametrize("block", [1, 5, 16, 512])
def test_block_size_changes_nothing(tiny_llama, alone, block):
    engine = load(tiny_llama, kv_block_size=block, max_batch_tokens=50)
    assert continue_all(engine, PROMPTS, greedy(20)) == alone


def test_a_small_batch_makes_others_wait(tiny_llama, alone):
    engine = load(tiny_llama, max_batch_size=2)
    for index, tokens in enumerate(PROMPTS):
        engine.add(Request(str(index), tokens, greedy(20)))
    engine.step()
    assert (engine.stats.running, engine.stats.waiting) == (2, 4)
    drain(engine)
    assert engine.stats.finished == len(PROMPTS)
    assert engine.stats.generated_tokens == 20 * len(PROMPTS)
    assert engine.stats.kv_tokens_used == 0


def test_decodes_go_on_while_a_long_prompt_is_read(tiny_llama):
    engine = load(tiny_llama, max_batch_tokens=16)
    engine.add(Request("short", prompt(4), greedy(40)))
    engine.step()
    engine.add(Request("long", prompt(200), greedy(2)))
    for _ in range(10):  # 4 tokens of the long prompt a step
        assert [output.request_id for output in engine.step()] == ["short"]
        assert engine.scheduler.running[-1].computed <= 40
    engine.abort("short")
    engine.step()
    assert engine.scheduler.running[-1].computed == 56  # with nobody to wait for it, a whole step


def test_preemption_changes_nothing(tiny_llama, alone):
    engine = load(tiny_llama, kv_cache_tokens=160, kv_block_size=8, max_batch_size=6)
    assert continue_all(engine, PROMPTS, greedy(20)) == alone
    assert engine.stats.preemptions > 0
    assert engine.stats.kv_tokens_used == 0


def test_preempted_seeded_sampling_goes_on_where_it_was(tiny_llama):
    params = SamplingParams(seed=5, max_tokens=30, ignore_eos=True)
    roomy, tight = load(tiny_llama), load(tiny_llama, kv_cache_tokens=96, kv_block_size=8)
    prompts = [prompt(20, seed=i) for i in range(4)]
    assert continue_all(tight, prompts, params) == continue_all(roomy, prompts, params)
    assert tight.stats.preemptions > 0


def test_equal_beginnings_are_computed_once(tiny_llama, alone):
    engine = load(tiny_llama)
    first = continue_all(engine, PROMPTS, greedy(20))
    assert engine.stats.prefix_hit_tokens == 0
    second = continue_all(engine, PROMPTS, greedy(20))
    assert first == second == alone
    assert engine.stats.prefix_hit_tokens == sum((len(tokens) - 1) // 16 * 16 for tokens in PROMPTS)


def test_output_is_reused_as_the_next_turns_beginning(tiny_llama, alone):
    engine = load(tiny_llama)
    answer = continue_all(engine, [PROMPTS[1]], greedy(20))[0]
    turn = PROMPTS[1] + answer + prompt(9, seed=99)
    again = continue_all(engine, [turn], greedy(12))
    assert engine.stats.prefix_hit_tokens == 80  # 70 + 20 tokens, the last never computed: 5 full blocks
    assert again == continue_all(load(tiny_llama, prefix_cache=False), [turn], greedy(12))


def test_sharing_while_both_run(tiny_llama):
    beginning = prompt(64)
    prompts = [beginning + prompt(5, seed=i) for i in range(3)]
    engine = load(tiny_llama, max_batch_tokens=64)
    together = continue_all(engine, prompts, greedy(15))
    assert engine.stats.prefix_hit_tokens == 2 * 64
    assert together == continue_all(load(tiny_llama, prefix_cache=False), prompts, greedy(15))


def test_the_oldest_shared_blocks_go_first(tiny_llama):
    engine = load(tiny_llama, kv_cache_tokens=128, kv_block_size=16)
    old, new = prompt(49, seed=1), prompt(49, seed=2)
    for tokens in (old, new, prompt(49, seed=3)):  # four blocks each; the pool has eight
        continue_all(engine, [tokens], greedy(1))
    continue_all(engine, [new], greedy(1))
    assert engine.stats.prefix_hit_tokens > 0
    before = engine.stats.prefix_hit_tokens
    continue_all(engine, [old], greedy(1))
    assert engine.stats.prefix_hit_tokens == before


def test_prefix_cache_off_shares_nothing(tiny_llama):
    engine = load(tiny_llama, prefix_cache=False)
    for _ in range(2):
        continue_all(engine, [prompt(64)], greedy(2))
    assert engine.stats.prefix_hit_tokens == 0


def test_abort_waiting_and_running(tiny_llama, alone):
    engine = load(tiny_llama, max_batch_size=2)
    for index, tokens in enumerate(PROMPTS[:3]):
        engine.add(Request(str(index), tokens, greedy(20)))
    engine.step()
    assert engine.abort("0") and engine.abort("2")
    assert not engine.abort("0") and not engine.abort("nobody")
    outputs = drain(engine)
    tokens = [output.token_id for output in outputs if output.request_id == "1"]
    assert {output.request_id for output in outputs} == {"1"}
    assert alone[1][-len(tokens) :] == tokens
    assert engine.stats.aborted == 2 and engine.stats.kv_tokens_used == 0


def test_a_finished_id_may_be_used_again(tiny_llama):
    engine = load(tiny_llama)
    for _ in range(2):
        engine.add(Request("same", prompt(4), greedy(2)))
        assert len(drain(engine)) == 2


def test_requests_that_come_and_go_leave_no_blocks_behind(tiny_llama):
    """A long random life under a tight cache, with every block accounted for at the end."""
    import random

    rng = random.Random(0)
    engine = load(tiny_llama, kv_cache_tokens=192, kv_block_size=8, max_batch_size=5, max_batch_tokens=24)
    shared = prompt(40, seed=7)
    ids = []
    for number in range(60):
        tokens = shared[: rng.randrange(1, 40)] + prompt(rng.randrange(1, 30), seed=number)
        engine.add(Request(str(number), tokens, greedy(rng.randrange(1, 30))))
        ids.append(str(number))
        for _ in range(rng.randrange(4)):
            engine.step()
        if rng.random() < 0.2:
            engine.abort(rng.choice(ids))
    drain(engine)
    pool = engine.scheduler.pool
    assert engine.stats.preemptions > 0 and engine.stats.prefix_hit_tokens > 0
    assert len(pool.free) == pool.total and not any(pool._holders)
    assert engine.stats.finished + engine.stats.aborted == 60

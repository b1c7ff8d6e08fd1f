"""The decoder as one C++ program: near float32's logits, and the same bits however the work is cut."""

import shutil
from array import array

import numpy as np
import pytest
from engine_models import CASES, build_case, continue_all, drain, greedy, load, prompt

from fourfold.compress import Recipe, quantize
from fourfold.engine import Request
from fourfold.engine.packed_cache import FOLDER
from fourfold.kernels import native_available, set_threads, threads
from fourfold.kernels.cpu.packed import PackedWeight

pytestmark = pytest.mark.skipif(not native_available(), reason="the C++ extension is not built")

TOKENS = prompt(150)
PLAIN = [(model, case) for model, cases in CASES.items() for case in cases]


def native(folder, **config):
    engine = load(folder, **({"dtype": "bfloat16"} | config))
    assert not engine.arithmetic.startswith("torch"), engine.arithmetic
    return engine


def recipe(**changes) -> Recipe:
    rule = {"weight": "mxfp4", "scale_rule": "even"} | changes.pop("rule", {})
    return Recipe.model_validate({"name": "test", "rules": [rule], "passes": ["rtn"]} | changes)


def error(ours: np.ndarray, exact: np.ndarray) -> float:
    """Root mean square difference of a position's logits, as a share of how much they vary: the median one.

    A router that rounds to another expert spoils the positions after it, in torch's bfloat16 as well.
    """
    return float(np.median(np.sqrt(np.mean((ours - exact) ** 2, -1)) / exact.std()))


@pytest.fixture(scope="module", params=PLAIN, ids="-".join)
def models(request, tmp_path_factory):
    """A model of bfloat16 weights, and the same in MXFP4."""
    where = tmp_path_factory.mktemp("native")
    source = build_case(where / "source", *request.param)
    quantize(source, where / "mxfp4", recipe())
    return source, where / "mxfp4"


def test_exact_is_no_farther_from_float32_than_torch_in_bfloat16(models, monkeypatch):
    for folder in models:
        exact = load(folder).logits(TOKENS)
        ours = native(folder, arithmetic="exact").logits(TOKENS)
        monkeypatch.setattr("fourfold.engine.obstacles.native_available", lambda: False)
        torchs = load(folder, dtype="bfloat16").logits(TOKENS)
        monkeypatch.undo()
        assert error(ours, exact) < 1.25 * error(torchs, exact) < 0.1


def test_int8_adds_what_rounding_inputs_to_int8_adds(models):
    _, folder = models
    exact = load(folder).logits(TOKENS)
    assert error(native(folder).logits(TOKENS), exact) < 0.05


def test_layer_by_layer_is_the_whole(models):
    engine = native(models[1], max_batch_tokens=64)
    states = engine.embedded(TOKENS)
    for layer in range(engine.layer_count):
        states = engine.through(states, layer, layer + 1)
    assert np.array_equal(engine.logits_of(states), engine.logits(TOKENS))


@pytest.fixture(scope="module", params=["llama", "gpt_oss", "gemma3_text"])
def packed(request, tmp_path_factory):
    where = tmp_path_factory.mktemp("native")
    source = build_case(where / "source", request.param, next(iter(CASES[request.param])))
    quantize(source, where / "mxfp4", recipe())
    return where / "mxfp4"


def served_logits(engine, prompts: list[list[int]]) -> list[np.ndarray]:
    """Logits [V] after each prompt as steps compute them, all prompts together."""
    seen: dict[str, np.ndarray] = {}
    step = engine._decoder.step

    def watched(cache, chunks, chosen):
        logits, likeliest = step(cache, chunks, chosen)
        ends = [chunk.sequence.request.request_id for chunk in chunks if chunk.yields_token]
        for key, row in zip(ends, logits, strict=True):
            seen.setdefault(key, row.copy())
        return logits, likeliest

    engine._decoder.step = watched
    for index, tokens in enumerate(prompts):
        engine.add(Request(str(index), tokens, greedy(6)))
    drain(engine)
    return [seen[str(index)] for index in range(len(prompts))]


PROMPTS = [prompt(n, seed=n) for n in (3, 70, 17, 33, 1, 120)]


@pytest.fixture(scope="module")
def alone(packed):
    engine = native(packed, max_batch_tokens=256, prefix_cache=False)
    return [engine.logits(tokens)[-1] for tokens in PROMPTS]


@pytest.mark.parametrize(
    "config",
    [
        {"max_batch_tokens": 256, "max_batch_size": 8},
        {"max_batch_tokens": 16},
        {"max_batch_tokens": 7, "max_batch_size": 6, "kv_block_size": 5},
        {"kv_cache_tokens": 152, "kv_block_size": 8, "max_batch_size": 6},
        {"threads": 3},
    ],
    ids=["together", "chunks", "odd", "preempted", "threads"],
)
def test_the_same_bits_however_the_work_is_cut(packed, alone, config):
    before = threads()
    try:
        engine = native(packed, **config)
        for ours, theirs in zip(served_logits(engine, PROMPTS), alone, strict=True):
            assert np.array_equal(ours, theirs)
        assert engine.stats.preemptions > 0 or "kv_cache_tokens" not in config
    finally:
        set_threads(before)


def test_logits_of_chosen_rows_are_those_of_all(packed):
    """The last layer computes for the chosen rows alone."""
    engine, first, second = native(packed, kv_block_size=16), prompt(40), prompt(33, seed=1)
    exact = np.concatenate([engine.logits(first), engine.logits(second)])
    decoder = engine._decoder
    decoder.use(engine.cache)
    tokens, spans = array("i", first + second), array("i", (40, 0, 3, 33, 0, 3))
    for chosen in ([], [39], [72], [0, 5, 6, 38, 39, 40, 41, 72], list(range(73))):
        decoder.program.run(tokens, spans, array("i", range(6)), array("i", chosen))
        assert np.array_equal(decoder._logits[: len(chosen)], exact[chosen])


def test_shared_beginnings_change_no_bit(packed):
    beginning = prompt(64)
    prompts = [beginning + prompt(5, seed=i) for i in range(3)]
    engine = native(packed)
    first = continue_all(engine, prompts, greedy(12))
    again = continue_all(engine, prompts, greedy(12))
    assert engine.stats.prefix_hit_tokens > 0
    assert first == again == continue_all(native(packed, prefix_cache=False), prompts, greedy(12))


@pytest.mark.parametrize("kv_cache", ["none", "fp8"])
@pytest.mark.parametrize("arithmetic", ["int8", "exact"])
def test_greedy_tokens_are_the_largest_logits(packed, kv_cache, arithmetic):
    engine = native(packed, kv_cache=kv_cache, arithmetic=arithmetic)
    tokens = prompt(40)
    answer = continue_all(engine, [tokens], greedy(10))[0]
    logits = engine.logits(tokens + answer)
    assert answer == logits[len(tokens) - 1 : -1].argmax(-1).tolist()


def test_the_next_start_reads_what_was_packed(packed, tmp_path, monkeypatch):
    monkeypatch.setattr("fourfold.engine.engine.LEAST_CACHED_BYTES", 0)
    folder = shutil.copytree(packed, tmp_path / "model")
    first = native(folder).logits(TOKENS)
    monkeypatch.setattr(PackedWeight, "pack_rows", None)
    assert np.array_equal(native(folder).logits(TOKENS), first)
    with pytest.raises(TypeError):
        native(folder, packed_cache=False)


@pytest.mark.parametrize(
    ("model", "case"), [("mixtral", "fused"), ("qwen3_moe", "fused"), ("gpt_oss", "plain")]
)
def test_stacks_of_experts_are_packed_once_and_again_when_the_file_is_damaged(
    model, case, tmp_path, monkeypatch
):
    monkeypatch.setattr("fourfold.engine.engine.LEAST_CACHED_BYTES", 0)
    folder, packings = build_case(tmp_path / "model", model, case), []
    pack_rows = PackedWeight.pack_rows
    monkeypatch.setattr(PackedWeight, "pack_rows", lambda w: packings.append(w) or pack_rows(w))
    first = native(folder).logits(TOKENS)
    count = len(packings)
    assert count > 2 * load(folder).model.shape.layers, "no experts were packed"
    assert np.array_equal(native(folder).logits(TOKENS), first) and len(packings) == count
    (place,) = (folder / FOLDER).iterdir()
    whole = place.read_bytes()
    place.write_bytes(whole[:-4096] + bytes([whole[-4096] ^ 1]) + whole[-4095:])
    assert np.array_equal(native(folder).logits(TOKENS), first) and len(packings) == 2 * count


def test_what_the_program_cannot_say_is_left_to_torch(tiny_llama, tmp_path):
    assert load(tiny_llama).arithmetic == "torch: the model is to be computed in float32"
    assert "mxfp4" in load(tiny_llama, dtype="bfloat16", kv_cache="mxfp4").arithmetic
    quantize(tiny_llama, tmp_path / "a8", recipe(rule={"activation": "fp8-token"}))
    engine = load(tmp_path / "a8", dtype="bfloat16")
    assert engine.arithmetic == "torch: inputs are rounded to fp8-token"
    assert len(continue_all(engine, [prompt(5)], greedy(3))[0]) == 3


def test_8_bit_activations_are_int8_unless_exactness_is_asked_for(tiny_llama, tmp_path):
    quantize(tiny_llama, tmp_path / "a8", recipe(rule={"activation": "mxfp8-e4m3"}), "quark")
    assert native(tmp_path / "a8").arithmetic == "int8"
    assert native(tmp_path / "a8", arithmetic="exact").arithmetic == "exact"


@pytest.mark.parametrize("head", ["mxfp4", "mxfp8-e4m3"])
def test_packed_heads_and_parts_of_different_schemes(tiny_llama, tmp_path, head):
    rules = [
        {"modules": ["lm_head"], "weight": head},
        {"modules": ["*"], "weight": "mxfp4", "scale_rule": "even"},
    ]
    mixed = Recipe.model_validate(
        {"name": "t", "rules": rules, "passes": ["rtn"], "keep_default": False, "keep": ["*.v_proj"]}
    )
    quantize(tiny_llama, tmp_path / "out", mixed)
    exact = load(tmp_path / "out").logits(TOKENS)
    assert error(native(tmp_path / "out", arithmetic="exact").logits(TOKENS), exact) < 0.02
    assert error(native(tmp_path / "out").logits(TOKENS), exact) < 0.03

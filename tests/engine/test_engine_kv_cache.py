"""Quantized KV caches: the formats' own rounding, memory really saved, one answer on every way."""

import json

import numpy as np
import pytest
import torch
from engine_models import continue_all, greedy, load, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_checkpoints import with_kv_cache
from safetensors.torch import load_file, save_file
from tiny_models import build_tiny_model

from fourfold.core.errors import FourfoldError, UsageError
from fourfold.engine.kv_format import kv_format
from fourfold.formats import get_format, hadamard, turn

TOKENS = prompt(90)
MICROSCALED = ["mxfp8-e4m3", "mxfp4"]
FORMATS = ["fp8", "fp8-head", *MICROSCALED]
SCALES = {
    f"model.layers.{layer}.self_attn.{part}": torch.tensor([0.01, 0.002]) * (layer + 1)
    for layer in range(2)
    for part in ("k_proj", "v_proj")
}


@pytest.fixture(scope="module")
def per_head(tiny_llama, tmp_path_factory):
    return with_kv_cache(tiny_llama, tmp_path_factory.mktemp("kv") / "head", "fp8-head", SCALES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", MICROSCALED)
@given(seed=st.integers(0, 2**32 - 1), power=st.integers(-140, 120), blocks=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_blocks_read_back_as_the_formats_own(name, dtype, seed, power, blocks):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, 32 * blocks, generator=generator).ldexp(torch.tensor(float(power))).to(dtype)
    x[0, 0, 0], x[1, 1] = torch.nan, 0.0
    form = kv_format(name, dtype, 32 * blocks)
    held = form.encode(0, x)
    assert held.dtype == torch.uint8 and held.shape == (3, 4, form.width)
    reference = get_format(name).quantize(turn(x.float(), hadamard()))
    expected = torch.cat([reference.blocks, reference.scales], -1)
    assert torch.equal(held, expected)
    assert torch.equal(form.decode(0, held).nan_to_num(7.0), reference.dequantize(dtype).nan_to_num(7.0))


@pytest.mark.parametrize(
    ("name", "bits"), [(None, 16), ("fp8", 8), ("fp8-head", 8), ("mxfp8-e4m3", 8.25), ("mxfp4", 4.25)]
)
def test_memory_is_really_saved(per_head, name, bits):
    engine = load(per_head, kv_cache=name or "none", dtype="bfloat16", kv_cache_tokens=160)
    values = 2 * (160 + 16) * 2 * 2 * 32  # layers, tokens and the zero block, k and v, heads, features
    assert engine.cache.data.nbytes * 8 == values * bits
    assert engine.card.kv_cache_format == name


def test_a_given_number_of_bytes_holds_more_tokens(tiny_llama, monkeypatch):
    monkeypatch.setattr("fourfold.engine.loading.DEFAULT_KV_BYTES", 1 << 20)
    tokens = [
        load(tiny_llama, kv_cache=name, dtype="bfloat16").stats.kv_tokens_total for name in ("none", "mxfp4")
    ]
    assert tokens == [2048, 7696]


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_dense_paged_chunked_shared_and_batched(per_head, name):
    engine = load(per_head, kv_cache=name, max_batch_tokens=16)
    answer = continue_all(engine, [TOKENS], greedy(10))[0]
    assert continue_all(engine, [TOKENS], greedy(10))[0] == answer
    assert engine.stats.prefix_hit_tokens > 0
    assert continue_all(engine, [TOKENS, prompt(33, seed=1)], greedy(10))[0] == answer
    dense = engine.logits(TOKENS + answer)[len(TOKENS) - 1 : -1]
    assert dense.argmax(-1).tolist() == answer


@pytest.mark.parametrize("name", FORMATS)
def test_what_decoding_says_is_what_logits_say(per_head, name):
    engine = load(per_head, kv_cache=name, max_batch_tokens=32)
    (done,) = engine.generate([TOKENS], greedy(24, logprobs=5))
    logits = torch.from_numpy(engine.logits(TOKENS + done.token_ids)[len(TOKENS) - 1 : -1])
    dense = logits.log_softmax(-1).gather(-1, torch.tensor(done.token_ids)[:, None])[:, 0]
    np.testing.assert_allclose(dense.numpy(), np.array(done.logprobs), atol=2e-4)


def test_each_format_moves_the_logits_and_fewer_bits_move_them_further(per_head):
    exact = load(per_head, kv_cache="none").logits(TOKENS)
    error = {name: np.abs(load(per_head, kv_cache=name).logits(TOKENS) - exact).mean() for name in FORMATS}
    assert 0 < error["mxfp8-e4m3"] < error["mxfp4"] / 3
    assert 0 < error["fp8-head"] < error["mxfp4"] / 3


@pytest.mark.parametrize("name", MICROSCALED)
def test_turning_changes_nothing_but_the_rounding(name):
    form = kv_format(name, torch.float32, 64)
    queries, keys = torch.randn(2, 20, 3, 64, generator=torch.Generator().manual_seed(0)).unbind()
    held = turn(keys, hadamard())  # without rounding
    torch.testing.assert_close((form.turn(queries) * held).sum(-1), (queries * keys).sum(-1))
    torch.testing.assert_close(form.turn(held), keys)


def test_a_loud_feature_costs_its_block_less_than_unturned():
    keys = torch.randn(400, 2, 32, generator=torch.Generator().manual_seed(0))
    keys[..., 5] += 30.0
    form = kv_format("mxfp4", torch.float32, 32)
    kept = form.turn(form.decode(0, form.encode(0, keys)))
    quiet = [i for i in range(32) if i != 5]
    plain = get_format("mxfp4").fake_quantize(keys)
    assert (kept - keys)[..., quiet].square().mean() < 0.5 * (plain - keys)[..., quiet].square().mean()


def test_fp8_rounds_as_e4m3_with_its_scale_and_saturates():
    values = torch.tensor([0.3, -1000.0, 448.0, 0.001, 17.0, -0.0]).repeat(2, 1).unsqueeze(0)
    plain = kv_format("fp8", torch.float32, 6)
    expected = values.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(plain.decode(0, plain.encode(0, values)), expected)
    scaled = kv_format("fp8", torch.float32, 6, torch.tensor([[1.0, 1.0], [0.5, 4.0]]))
    kept = scaled.decode(1, scaled.encode(1, values))
    assert kept[0, :, 1].tolist() == [-448.0 * 0.5, -256.0 * 4]  # largest; 250 is nearest to 256


def test_fp8_keeps_its_scales_in_float32():
    scale = 0.0173  # no bfloat16
    form = kv_format("fp8", torch.bfloat16, 127, torch.tensor([[scale, scale]]))
    codes = torch.arange(0, 127, dtype=torch.uint8).repeat(2, 1).unsqueeze(0)
    exact = codes.view(torch.float8_e4m3fn).float() * torch.tensor(scale)
    assert torch.equal(form.decode(0, codes), exact.bfloat16())
    assert torch.equal(form.encode(0, form.decode(0, codes)), codes)


def test_the_scales_of_heads_reach_their_heads(per_head):
    form = load(per_head, kv_cache="auto").cache.form
    kv = torch.full((1, 4, 32), 1000.0)  # saturates: what is left is 448 times the scale
    largest = form.decode(1, form.encode(1, kv))[0, :, 0] / 448
    expected = [SCALES[f"model.layers.1.self_attn.{part}"] for part in ("k_proj", "v_proj")]
    torch.testing.assert_close(largest, torch.cat(expected))
    one = load(per_head, kv_cache="fp8").cache.form  # one scale must hold every head
    largest = one.decode(1, one.encode(1, kv))[0, :, 0] / 448
    torch.testing.assert_close(largest, torch.full((4,), 0.02))


def test_scales_of_heads_are_not_invented(tiny_llama):
    with pytest.raises(UsageError, match=r"calibrated scales.*stores none.*kv_cache: fp8-head"):
        load(tiny_llama, kv_cache="fp8-head")


@pytest.mark.parametrize("name", MICROSCALED)
def test_heads_that_blocks_do_not_fill_are_refused(tmp_path, name):
    folder = build_tiny_model(tmp_path / "narrow", head_dim=16)
    with pytest.raises(FourfoldError, match=r"multiple of 32 features.*have 16.*--kv-cache fp8"):
        load(folder, kv_cache=name)
    assert load(folder, kv_cache="fp8").card.kv_cache_format == "fp8"


@pytest.mark.parametrize(
    ("value", "match"), [(torch.nan, "not a positive number"), (None, "holds 3 numbers")]
)
def test_damaged_scales_are_refused(per_head, tmp_path, value, match):
    for file in per_head.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.self_attn.v_scale"
    tensors[name] = torch.ones(3, 1, 1) if value is None else torch.full((2, 1, 1), value)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FourfoldError, match=rf"1.self_attn.v_proj .*{match}"):
        load(tmp_path)
    assert load(tmp_path, kv_cache="none").card.kv_cache_format is None
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]

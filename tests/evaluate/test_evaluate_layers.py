"""Where the damage is: damage that was put somewhere is found there, and nowhere else."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build_tiny_model

from fourfold.checkpoint import open_checkpoint
from fourfold.compress import quantize
from fourfold.core.errors import FourfoldError
from fourfold.engine import Engine, EngineConfig
from fourfold.evaluate import default_texts, layer_picture, linear_errors
from fourfold.formats import hadamard, turn

LAYERS, DAMAGED = 4, 2


def silent(done: int, total: int) -> None:
    assert 0 < done <= total


def load(folder) -> Engine:
    return Engine.load(folder, EngineConfig(threads=1, kv_cache_tokens=64, dtype="float32"))


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("deep") / "deep", seed=7, num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    plain = {name: text.encode("ascii", "ignore").decode() for name, text in default_texts().items()}
    return {name: text[:600] for name, text in plain.items()}


def changed(source, folder, change):
    """A copy of a model with its tensors changed in place by ``change``."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_damage_in_one_layer_is_found_in_it(deep, texts, tmp_path):
    def spoil(tensors):
        torch.manual_seed(0)
        name = f"model.layers.{DAMAGED}.mlp.down_proj.weight"
        tensors[name] += 0.05 * torch.randn(tensors[name].shape)

    spoilt = load(changed(deep, tmp_path / "spoilt", spoil))
    picture = layer_picture(spoilt, load(deep), texts, window_tokens=48, windows_per_text=2, progress=silent)
    assert [e.layer for e in picture.layers] == list(range(LAYERS)) and picture.windows == 6
    for error in picture.layers:
        hit = error.layer == DAMAGED
        assert (error.own_error > 0.01) is hit and (error.kl_divergence.value > 1e-6) is hit
        assert (error.built_up_error > 0.01) is (error.layer >= DAMAGED)
    assert picture.layers[DAMAGED].own_error == pytest.approx(picture.layers[DAMAGED].built_up_error)


def test_a_layer_at_a_time_is_the_whole_model(deep, texts):
    engine = load(deep)
    ids = engine.encode(texts["opticks"])[:40]
    states = engine.embedded(ids)
    for layer in range(engine.layer_count):
        before = states.copy()
        after = engine.through(states, layer, layer + 1)
        assert np.array_equal(states, before), "the states handed in stay as they are"
        states = after
    np.testing.assert_allclose(engine.logits_of(states), engine.logits(ids), rtol=1e-4, atol=1e-4)


def test_linears_of_a_quantized_checkpoint(deep, tmp_path):
    quantize(deep, tmp_path / "q", "mxfp4")
    model, base = open_checkpoint(tmp_path / "q"), open_checkpoint(deep)
    errors, notes = linear_errors(model, base, silent)
    assert len(errors) == LAYERS * 7 and notes == []
    chosen = next(e for e in errors if e.name == "model.layers.1.mlp.up_proj")
    weight = base.load(chosen.name + ".weight").float()
    rounded = model.load(chosen.name + ".weight").dequantize(torch.float32)
    expected = float((rounded - weight).norm() / weight.norm())
    assert (chosen.layer, chosen.format) == (1, "mxfp4")
    assert chosen.relative_error == pytest.approx(expected, rel=1e-5)
    assert chosen.sqnr_db == pytest.approx(-20 * np.log10(expected), rel=1e-5)
    assert all(17 < e.sqnr_db < 21 for e in errors)  # MXFP4 of Gaussian weights


def test_folded_scales_and_another_base_are_told(deep, tmp_path):
    def fold(tensors):
        tensors["model.layers.0.input_layernorm.weight"] *= 3.0
        for name in ("q_proj", "k_proj", "v_proj"):
            tensors[f"model.layers.0.self_attn.{name}.weight"] /= 3.0

    quantize(changed(deep, tmp_path / "folded", fold), tmp_path / "q", "mxfp4")
    _, notes = linear_errors(open_checkpoint(tmp_path / "q"), open_checkpoint(deep), silent)
    assert len(notes) == 2
    assert "1 norms differ" in notes[0] and "3 weights are more than half" in notes[1]


def test_a_turned_weight_is_turned_back():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    back = turn(turn(weight, hadamard()), hadamard().T)
    torch.testing.assert_close(back, weight)


def test_models_that_do_not_correspond_are_refused(deep, tiny_llama, texts, tmp_path):
    with pytest.raises(FourfoldError, match="2 layers and its base 4"):
        layer_picture(load(tiny_llama), load(deep), texts, progress=silent)

    def rotate(tensors):
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].flip(-1)

    turned = load(changed(deep, tmp_path / "turned", lambda tensors: rotate_all(tensors, rotate)))
    with pytest.raises(FourfoldError, match="embeddings of 'turned'"):
        layer_picture(turned, load(deep), texts, window_tokens=48, progress=silent)


def rotate_all(tensors, rotate) -> None:
    rotate(tensors)
    for name, value in tensors.items():
        tensors[name] = value.contiguous()

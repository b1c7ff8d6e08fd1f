"""Rotations: the function stays, outliers stop hurting, checkpoints say what was done in both dialects."""

import json
from pathlib import Path

import pytest
import torch
from compress_models import build_moe, change_tensor
from layer_at_work import at_work, build_model, output_error, recipe_of, run_passes, tokens
from safetensors.torch import load_file

from fourfold.checkpoint import open_checkpoint
from fourfold.checkpoint.convert import convert
from fourfold.checkpoint.verify import verify
from fourfold.compress import plan, quantize
from fourfold.compress.calibrated.loop import LayerLoop
from fourfold.compress.calibrated.skeleton import Skeleton
from fourfold.compress.calibrated.store import LayerStore
from fourfold.compress.calibrated.trained_transform import TrainedTransform, check_memory
from fourfold.compress.passes import kl_rotation
from fourfold.compress.pipeline import check_recipe, get_pass, prepare
from fourfold.compress.resolve import open_source, resolve
from fourfold.core.errors import FourfoldError, UsageError
from fourfold.formats import BlockTensor, hadamard, hadamard_signs, turn

FEW_STEPS = {"steps": 8, "sequences": 4, "micro": 4, "checks": 2, "rotation_lr": 0.01, "smoothing_lr": 0.03}
TRAINED = {"kl-rotation": FEW_STEPS}
Q0, DOWN0 = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def loud(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("loud") / "source")


@pytest.fixture(scope="module")
def trained(loud, tmp_path_factory):
    """A W4A4 model with trained rotations in compressed-tensors."""
    out = tmp_path_factory.mktemp("trained") / "out"
    quantize(loud, out, recipe_of(TRAINED, "rtn", activation="mxfp4"), calibration=tokens())
    return out


@pytest.fixture(scope="module")
def turned(loud, tmp_path_factory):
    """A W4A16 model with block rotations in compressed-tensors."""
    out = tmp_path_factory.mktemp("turned") / "out"
    quantize(loud, out, recipe_of("block-rotation", "rtn"), calibration=tokens())
    return out


def transforms(folder: Path) -> dict[str, str | None]:
    return {m: s.input_transform for m, s in open_checkpoint(folder).quantization.layers.items()}


def test_hadamard_is_orthogonal_and_turns_runs_of_32():
    assert torch.allclose(hadamard() @ hadamard(), torch.eye(32), atol=1e-6)
    x = torch.randn(3, 96)
    expected = torch.cat([part @ hadamard() for part in x.split(32, -1)], -1)
    assert torch.allclose(turn(x, hadamard()), expected, atol=1e-6)


@pytest.mark.parametrize("rotation", ["block-rotation", TRAINED])
def test_the_layer_computes_what_it_did(loud, tmp_path, rotation):
    recipe = recipe_of(rotation, "rtn")
    work = at_work(loud, tmp_path / "layers", recipe)
    if rotation is TRAINED:
        store = LayerStore(tmp_path / "layers")
        found = store.find("kl-rotation")
        assert found is not None
        work.learned = store.load_all("kl-rotation", found)
    weight = work.linears[Q0].weight.clone()
    before = [work.forward(hidden) for hidden in work.inputs]
    run_passes(work, recipe)
    assert (work.linears[Q0].weight - weight).norm() > 0.5 * weight.norm()
    for hidden, expected in zip(work.inputs, before, strict=True):
        assert (work.forward(hidden) - expected).norm() < 1e-4 * expected.norm()


def test_an_outlier_costs_less(loud, tmp_path):
    errors = {}
    for name, passes in {"rtn": ["rtn"], "rotated": ["block-rotation", "rtn"]}.items():
        recipe = recipe_of(*passes, activation="mxfp4")
        work = at_work(loud, tmp_path / name, recipe_of("block-rotation", "rtn", activation="mxfp4"))
        original = [work.forward(hidden) for hidden in work.inputs]
        run_passes(work, recipe)
        work.round_rest(lambda _, weight, scheme: quantized(weight, scheme))
        errors[name] = output_error(work, original)
    assert errors["rotated"] < 0.8 * errors["rtn"]


def quantized(weight, scheme):
    from fourfold.formats import get_format

    return get_format(scheme.weight).quantize(weight, scheme.scale_rule)


def test_modules_are_chosen_by_globs_and_by_their_inputs(tmp_path):
    odd = build_model(tmp_path / "odd", intermediate_size=80, num_hidden_layers=1)
    recipe = recipe_of({"block-rotation": {"modules": ["*.mlp.*", "*.v_proj"]}}, "rtn", weight="fp8-channel")
    quantize(odd, tmp_path / "out", recipe, calibration=tokens(2))
    done = {name.rpartition(".")[2] for name, how in transforms(tmp_path / "out").items() if how}
    assert done == {"gate_proj", "up_proj", "v_proj"}
    nothing = recipe_of({"block-rotation": {"modules": ["*.down_proj"]}}, "rtn", weight="fp8-channel")
    with pytest.raises(UsageError, match="rotates nothing"):
        quantize(odd, tmp_path / "other", nothing, calibration=tokens(2))


@pytest.mark.parametrize("name", ["turned", "trained"])
def test_dialects_hold_the_same(name, request, tmp_path):
    source = request.getfixturevalue(name)
    convert(source, tmp_path / "quark", "quark")
    convert(tmp_path / "quark", tmp_path / "back", "compressed-tensors")
    first, *others = (open_checkpoint(folder) for folder in (source, tmp_path / "quark", tmp_path / "back"))
    how = "hadamard" if name == "turned" else "trained"
    assert set(transforms(source).values()) == {how} and verify(source).passed
    for other in others:
        assert verify(Path(other.source)).passed
        assert other.quantization == first.quantization and set(other.names()) == set(first.names())
        for tensor in first.names():
            assert same(first.load(tensor), other.load(tensor)), tensor
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == stored(source).keys()


def same(a, b) -> bool:
    if isinstance(a, BlockTensor):
        return torch.equal(a.blocks, b.blocks) and torch.equal(a.scales, b.scales)
    return torch.equal(a, b)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def settings(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_compressed_tensors_says_it_in_its_own_words(turned, trained):
    from compressed_tensors.transform import TransformConfig

    (group,) = TransformConfig(**settings(turned)["transform_config"]).config_groups.values()
    assert (group.type, group.head_dim, group.apply[0].location) == ("hadamard", 32, "input")
    names = [name for name in stored(turned) if "block_rotation" in name]
    assert len(names) == 1 and torch.equal(stored(turned)[names[0]], hadamard_signs().float())
    groups = TransformConfig(**settings(trained)["transform_config"]).config_groups
    assert len(groups) == 8 and {g.type for g in groups.values()} == {"random-hadamard"}
    for name, group in groups.items():
        for module in group.apply[0].targets:
            matrix = stored(trained)[f"{module}.{name}_input.weight"] / 32**0.5
            assert torch.allclose(matrix @ matrix.T, torch.eye(32), atol=1e-5)


def test_quark_says_it_in_its_own_words(turned, trained, tmp_path):
    for source, dtype in ((turned, torch.int8), (trained, torch.float64)):
        out = tmp_path / str(dtype)
        convert(source, out, "quark")
        (algorithm,) = settings(out)["algo_config"]
        online = algorithm["online_config"]["online_rotation_layers"]
        assert (algorithm["name"], algorithm["rotation_size"]) == ("rotation", 32)
        assert algorithm["trainable"] == (dtype == torch.float64) and len(online) == 14
        assert {stored(out)[f"{module}.input_rotation"].dtype for module in online} == {dtype}


def test_damaged_rotations_are_refused(turned, trained, tmp_path):
    def open_changed(source: Path, change, edit=lambda s: s) -> None:
        out = tmp_path / f"damaged{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        for file in source.iterdir():
            (out / file.name).write_bytes(file.read_bytes())
        (out / "fourfold.json").unlink()
        config = json.loads((out / "config.json").read_text())
        edit(config["quantization_config"])
        (out / "config.json").write_text(json.dumps(config))
        name = next(n for n in stored(out) if "_input.weight" in n)
        change_tensor(out, name, change)
        open_checkpoint(out)

    open_changed(turned, lambda m: m)
    with pytest.raises(FourfoldError, match="not Sylvester's"):
        open_changed(turned, lambda m: -m)
    with pytest.raises(FourfoldError, match=r"not a float matrix of \[32, 32\]"):
        open_changed(trained, lambda m: m[:16])

    def ignore_nothing(quantization_config: dict) -> None:
        group = quantization_config["transform_config"]["config_groups"]["block_rotation"]
        group["apply"][0]["ignore"] = []

    with pytest.raises(FourfoldError, match="'lm_head', which is not quantized"):
        open_changed(turned, lambda m: m, ignore_nothing)


def test_layers_of_one_input_must_be_turned_alike(trained, tmp_path):
    convert(trained, tmp_path / "quark", "quark")
    (tmp_path / "quark" / "fourfold.json").unlink()
    change_tensor(tmp_path / "quark", f"{Q0}.input_rotation", lambda m: m.roll(1, 0))
    with pytest.raises(UsageError, match=r"k_proj.* have one input but turn it by different"):
        convert(tmp_path / "quark", tmp_path / "out", "compressed-tensors")


def test_training_brings_the_logits_nearer(trained):
    note = next(note for note in open_checkpoint(trained).notes if note.startswith("kl-rotation"))
    first, last = (float(word.rstrip(".")) for word in note.split() if word[0].isdigit())
    assert 0 < last < 0.9 * first


def test_training_is_not_repeated(loud, tmp_path):
    recipe = recipe_of({"kl-rotation": FEW_STEPS | {"steps": 1}}, "rtn")
    model = prepare(recipe, resolve(open_source(loud), recipe).model)

    def written() -> int:
        LayerLoop(model, recipe, tokens(2), LayerStore(tmp_path), torch.device("cpu")).start()
        (file,) = (tmp_path / "layers").glob("kl-rotation*.safetensors")
        return file.stat().st_mtime_ns

    assert written() == written()


def test_experts_share_what_they_read_and_a_router_is_left_alone(tmp_path):
    moe = build_moe(tmp_path / "moe", "qwen3_moe")
    recipe = recipe_of({"kl-rotation": FEW_STEPS | {"steps": 1}}, "rtn")
    model = prepare(recipe, resolve(open_source(moe), recipe).model)
    options = kl_rotation.Options(**FEW_STEPS | {"steps": 1})
    learned = kl_rotation.learn(Skeleton(model, torch.device("cpu")), tokens(2), options, lambda model: None)
    experts = "model.layers.0.mlp.experts"
    assert torch.equal(
        learned[f"{experts}.0.up_proj.input_rotation"], learned[f"{experts}.3.gate_proj.input_rotation"]
    )
    smoothed = {name for name in learned if name.endswith(".smoothing")}
    assert "model.layers.0:input_layernorm.smoothing" in smoothed
    assert "model.layers.0:post_attention_layernorm.smoothing" not in smoothed


def test_the_transformed_model_starts_as_block_rotation(loud, turned):
    """Before its first step the trained model is the checkpoint that block-rotation makes."""
    recipe = recipe_of(TRAINED, "rtn")
    model = prepare(recipe, resolve(open_source(loud), recipe).model)
    ids = tokens().token_ids
    transform = TrainedTransform(Skeleton(model, torch.device("cpu")), ids, smoothing=True)
    with torch.no_grad():
        transform.logits(ids[:1], served=True)
        linear = transform.model.linears[DOWN0]
        weight = linear._rounded_weight()
    held = open_checkpoint(turned).load(f"{DOWN0}.weight")
    assert isinstance(held, BlockTensor)
    assert (weight - held.dequantize()).norm() < 1e-2 * weight.norm()


def test_what_makes_no_sense_is_refused(loud):
    with pytest.raises(UsageError, match="'smoothquant' before 'kl-rotation'"):
        check_recipe(recipe_of("smoothquant", "kl-rotation", "rtn"))
    with pytest.raises(UsageError, match="two rotations are one"):
        check_recipe(recipe_of("block-rotation", "kl-rotation", "rtn"))
    with pytest.raises(UsageError, match="cannot take `rate`"):
        check_recipe(recipe_of({"kl-rotation": {"rate": 1}}, "rtn"))
    recipe = recipe_of("kl-rotation", "rtn")
    skeleton = Skeleton(resolve(open_source(loud), recipe).model, torch.device("cpu"))
    check_memory(skeleton, 512, 10**9)
    with pytest.raises(FourfoldError, match=r"GB are free on cpu. Lower `micro`"):
        check_memory(skeleton, 512, 10**6)


def test_a_module_outside_the_decoder_is_refused(loud, tmp_path):
    recipe = recipe_of("block-rotation", "rtn")
    model = prepare(recipe, resolve(open_source(loud), recipe).model)
    scheme = model.quantization.layers[Q0]
    model.quantization.layers["mtp.layers.0.q_proj"] = scheme
    with pytest.raises(FourfoldError, match=r"mtp\.layers\.0\.q_proj is to be rotated"):
        LayerLoop(model, recipe, tokens(2), LayerStore(tmp_path), torch.device("cpu")).start()


def test_a_dry_run_begins_the_training_and_counts_the_rest(loud, tmp_path):
    def told_s(steps):
        recipe = recipe_of({"kl-rotation": FEW_STEPS | {"steps": steps}}, "rtn", activation="mxfp4")
        return plan(loud, recipe, calibration=tokens(), beside=tmp_path).time_estimate_s

    assert 3 < told_s(30_000) / told_s(3_000) < 30


def test_passes_are_known_by_their_names():
    assert get_pass("block-rotation").kind == get_pass("kl-rotation").kind == "rotate"

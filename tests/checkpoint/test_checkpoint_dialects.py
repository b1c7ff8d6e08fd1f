"""Dialects: every format they express survives being stored; what they cannot express is refused by name."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import projections, quantize_folder
from safetensors.torch import load_file, save_file

from fourfold.checkpoint import TensorInfo, dialect_names, open_checkpoint
from fourfold.checkpoint.dialect import get_dialect, kept_linears
from fourfold.checkpoint.dialects.compressed_tensors import ACTIVATIONS as CT_ACTIVATIONS
from fourfold.checkpoint.dialects.compressed_tensors import STORAGE
from fourfold.checkpoint.dialects.quark import ACTIVATIONS as QUARK_ACTIVATIONS
from fourfold.checkpoint.dialects.quark import WEIGHTS
from fourfold.checkpoint.verify import verify
from fourfold.core.errors import FourfoldError, UsageError
from fourfold.core.quantization import LayerScheme, Quantization
from fourfold.formats import BlockTensor, format_names, get_format

WRITABLE = [("compressed-tensors", form) for form in STORAGE] + [("quark", form) for form in WEIGHTS]
UNWRITABLE = [("compressed-tensors", f) for f in format_names() if f not in STORAGE]
UNWRITABLE += [("quark", f) for f in format_names() if f not in WEIGHTS]
ACTIVATED = [("compressed-tensors", form) for form in CT_ACTIVATIONS]
ACTIVATED += [("quark", form) for form in QUARK_ACTIVATIONS]
WHOLE_ROW = {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}


WIDE = {
    "lm_head": (32, 128),
    "model.embed_tokens": (32, 128),
    "model.norm": (128,),
    "model.layers.0.self_attn.q_proj": (128, 128),
    "model.layers.0.self_attn.k_proj": (64, 128),
    "model.layers.0.self_attn.v_proj": (64, 128),
    "model.layers.0.mlp.down_proj": (128, 256),
}


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory) -> Path:
    """Weights wide enough for groups of 128."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("models")
    save_file(
        {f"{n}.weight": torch.randn(s).bfloat16() for n, s in WIDE.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def same(a: torch.Tensor | BlockTensor, b: torch.Tensor | BlockTensor) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)
    whole = (a.global_scale is None) == (b.global_scale is None)
    if a.global_scale is not None and b.global_scale is not None:
        # compressed-tensors stores the reciprocal: one rounding there and one back
        whole = torch.allclose(a.global_scale, b.global_scale, rtol=2**-23, atol=0)
    parts = torch.equal(a.blocks, b.blocks) and torch.equal(a.scales, b.scales)
    return whole and parts and (a.format, a.shape, a.scale_rule) == (b.format, b.shape, b.scale_rule)


def test_the_dialects_are_known_by_name():
    assert dialect_names() == ["compressed-tensors", "mxfp4", "plain", "quark"]
    assert dialect_names(writable=True) == ["compressed-tensors", "plain", "quark"]


@pytest.mark.parametrize(("dialect", "form"), WRITABLE)
def test_what_is_stored_is_what_was_given(wide_llama, tmp_path, dialect, form):
    source = open_checkpoint(wide_llama)
    folder = quantize_folder(wide_llama, tmp_path / "out", dialect, projections(form))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.dialect == dialect and set(checkpoint.names()) == set(source.names())
    total = 0
    for name in source.names():
        original, info = source.load(name), checkpoint.info(name)
        assert isinstance(original, torch.Tensor) and info.shape == tuple(original.shape)
        quantized = name.endswith("_proj.weight")
        assert info.format == (form if quantized else None)
        assert same(checkpoint.load(name), get_format(form).quantize(original) if quantized else original)
        total += info.nbytes
    assert total == sum(t.nbytes for t in load_file(folder / "model.safetensors").values())
    assert checkpoint.card().weight_format == form and checkpoint.card().size_bytes == total


@pytest.mark.parametrize(("dialect", "form"), UNWRITABLE)
def test_a_format_that_cannot_be_expressed_is_refused_by_layer(wide_llama, tmp_path, dialect, form):
    with pytest.raises(UsageError, match=rf"_proj.*{dialect} cannot express weights in {form}"):
        quantize_folder(wide_llama, tmp_path / "out", dialect, projections(form))
    assert list(tmp_path.iterdir()) == []


def test_plain_refuses_what_is_quantized(wide_llama, tmp_path):
    with pytest.raises(UsageError, match="'plain' cannot express"):
        quantize_folder(wide_llama, tmp_path / "out", "plain", projections())


@pytest.mark.parametrize(("dialect", "activation"), ACTIVATED)
def test_activation_formats_come_back(tiny_llama, tmp_path, dialect, activation):
    scheme = projections("mxfp4", activation)
    checkpoint = open_checkpoint(quantize_folder(tiny_llama, tmp_path / "out", dialect, scheme))
    assert len(checkpoint.quantization.layers) == 14
    expected = LayerScheme(weight="mxfp4", scale_rule="even", activation=activation)
    assert set(checkpoint.quantization.layers.values()) == {expected}
    assert checkpoint.card().activation_format == activation


@pytest.mark.parametrize("dialect", ["compressed-tensors", "quark"])
def test_an_activation_that_cannot_be_expressed_is_refused(tiny_llama, tmp_path, dialect):
    with pytest.raises(UsageError, match="cannot express activations in nvfp4"):
        quantize_folder(tiny_llama, tmp_path / "out", dialect, projections("mxfp4", "nvfp4"))


def mixed(module: str) -> LayerScheme | None:
    """Three schemes, an unusual scale rule among them; the k_proj of one layer is kept."""
    if not module.endswith("_proj") or module.endswith("layers.1.self_attn.k_proj"):
        return None
    if "mlp" in module:
        return LayerScheme(weight="mxfp4", scale_rule="rceil", activation="mxfp8-e4m3")
    weight = "mxfp6-e2m3" if module.endswith("v_proj") else "mxfp4"
    return LayerScheme(weight=weight, scale_rule="even")


@pytest.mark.parametrize("kv_cache", [None, "fp8"])
@pytest.mark.parametrize("dialect", ["compressed-tensors", "quark"])
def test_mixed_schemes_come_back(tiny_llama, tmp_path, dialect, kv_cache):
    folder = quantize_folder(tiny_llama, tmp_path / "out", dialect, mixed, kv_cache=kv_cache)
    checkpoint = open_checkpoint(folder)
    names = [name.removesuffix(".weight") for name in checkpoint.names()]
    expected = {name: scheme for name in names if (scheme := mixed(name)) is not None}
    assert checkpoint.quantization.layers == expected
    assert checkpoint.quantization.kv_cache == kv_cache
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    kept = settings["ignore" if dialect == "compressed-tensors" else "exclude"]
    assert kept == ["lm_head", "model.layers.1.self_attn.k_proj"]


def test_a_head_is_a_target_by_name_since_vllms_is_no_linear(wide_llama, tmp_path):
    scheme = LayerScheme(weight="mxfp4", scale_rule="even")
    for ends, targets in ((("_proj", "lm_head"), ["Linear", "lm_head"]), (("_proj",), ["Linear"])):
        folder = quantize_folder(
            wide_llama,
            tmp_path / targets[-1],
            "compressed-tensors",
            lambda module, ends=ends: scheme if module.endswith(ends) else None,
        )
        settings = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert settings["config_groups"]["group_0"]["targets"] == targets
        assert open_checkpoint(folder).quantization.layers.get("lm_head") == (
            scheme if "lm_head" in ends else None
        )


@pytest.fixture
def gpt_oss(tmp_path) -> Path:
    """Two fused experts as gpt-oss stores them."""
    torch.manual_seed(0)
    tensors = {
        "model.layers.0.mlp.experts.gate_up_proj_blocks": torch.randint(0, 256, (2, 6, 2, 16)).byte(),
        "model.layers.0.mlp.experts.gate_up_proj_scales": torch.randint(100, 140, (2, 6, 2)).byte(),
        "model.layers.0.mlp.experts.gate_up_proj_bias": torch.randn(2, 6).bfloat16(),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_gpt_oss_experts_are_read_as_transformers_reads_them(gpt_oss):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    checkpoint = open_checkpoint(gpt_oss)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert checkpoint.names() == [name + "_bias", name] and checkpoint.dialect == "mxfp4"
    assert checkpoint.quantization.layers == {name: LayerScheme(weight="mxfp4")}
    assert checkpoint.info(name).shape == (2, 6, 64)
    loaded = checkpoint.load(name)
    stored = load_file(gpt_oss / "model.safetensors")
    expected = convert_moe_packed_tensors(stored[name + "_blocks"], stored[name + "_scales"])
    assert isinstance(loaded, BlockTensor)
    # transformers turns experts to [E, K, N]
    assert torch.equal(loaded.dequantize(torch.bfloat16), expected.transpose(1, 2))


def test_a_gpt_oss_pair_that_does_not_fit_is_refused(gpt_oss):
    tensors = load_file(gpt_oss / "model.safetensors")
    name = "model.layers.0.mlp.experts.gate_up_proj_scales"
    save_file(tensors | {name: tensors[name][:, :, :1].contiguous()}, gpt_oss / "model.safetensors")
    with pytest.raises(FourfoldError, match="no MXFP4 pair"):
        open_checkpoint(gpt_oss)


@pytest.fixture(scope="module")
def mxfp4_folder(tmp_path_factory, tiny_llama) -> Path:
    """The tiny Llama in MXFP4, compressed-tensors."""
    out = tmp_path_factory.mktemp("quantized") / "mxfp4"
    return quantize_folder(tiny_llama, out, "compressed-tensors", projections())


@pytest.fixture
def damaged(mxfp4_folder, tmp_path):
    """Change tensors or the quantization_config of a good folder, and open it."""

    def change(tensors=lambda t: t, settings=lambda s: s):
        folder = Path(shutil.copytree(mxfp4_folder, tmp_path / "damaged"))
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = settings(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors(load_file(folder / "model.safetensors")), folder / "model.safetensors")
        with pytest.raises(FourfoldError) as caught:
            open_checkpoint(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return change


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: {k: v for k, v in t.items() if k != f"{UP}.weight_scale"}, "other parts are not there"),
        (lambda t: {k: v for k, v in t.items() if k != f"{UP}.weight_packed"}, "other parts are not there"),
        (lambda t: t | {f"{UP}.weight_scale": t[f"{UP}.weight_scale"].float()}, "is stored as torch.uint8"),
        (lambda t: t | {f"{UP}.weight_packed": t[f"{UP}.weight_packed"].view(torch.int8)}, "is stored as"),
        (lambda t: t | {f"{UP}.weight_scale": t[f"{UP}.weight_scale"][:-1].clone()}, "cannot be the 192"),
        (lambda t: t | {f"{UP}.weight_packed": t[f"{UP}.weight_packed"][:, :-1].clone()}, "multiple of 32"),
        (lambda t: t | {f"{UP}.weight_zero_point": torch.zeros(1)}, "zero points"),
        (lambda t: t | {"model.layers.0.self_attn.k_scale": torch.ones(2)}, "one number for a whole cache"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(damaged, change, expected):
    assert expected in damaged(tensors=change)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "config_groups"}, "no config_groups"),
        (lambda s: s | {"config_groups": {"g": {"weights": {}}}}, "'g' without targets"),
        (
            lambda s: s | {"config_groups": {"g": s["config_groups"]["group_0"] | {"weights": None}}},
            "weights",
        ),
        (
            lambda s: s | {"config_groups": {"g": s["config_groups"]["group_0"] | {"targets": ["x"]}}},
            "targets",
        ),
        (
            lambda s: s | {"config_groups": {"g": s["config_groups"]["group_0"] | {"targets": ["re:("]}}},
            "regular",
        ),
        (lambda s: s | {"kv_cache_scheme": {"num_bits": 3}}, "KV cache"),
        (
            lambda s: s | {"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}},
            "applied to nothing",
        ),
        (
            lambda s: s | {"transform_config": {"config_groups": {"u": WHOLE_ROW}}},
            "transforms its",
        ),
        (lambda s: s | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "leaves out zeros"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(damaged, change, expected):
    assert expected in damaged(settings=change)


def test_a_transform_or_sparsity_that_does_nothing_is_read(tiny_llama, tmp_path):
    folder = quantize_folder(tiny_llama, tmp_path / "out", "compressed-tensors", projections())
    config = json.loads((folder / "config.json").read_text())
    nothing = {"transform_config": {"config_groups": {}}, "sparsity_config": {"format": "dense"}}
    config["quantization_config"] |= nothing
    (folder / "config.json").write_text(json.dumps(config))
    assert len(open_checkpoint(folder).quantization.layers) == 14


@pytest.mark.parametrize(
    ("algorithm", "read"),
    [
        ({"name": "rotation", "r1": True, "online_r1_rotation": True, "r4": False}, False),
        ({"name": "rotation", "r1": True, "online_r1_rotation": False, "r4": True}, False),
        ({"name": "rotation", "r1": True, "online_r1_rotation": None, "r4": False}, True),
        ({"name": "awq"}, True),
    ],
)
def test_quarks_rotations_of_activations_are_refused(tiny_llama, tmp_path, algorithm, read):
    folder = quantize_folder(tiny_llama, tmp_path / "out", "quark", projections())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["algo_config"] = [algorithm]
    (folder / "config.json").write_text(json.dumps(config))
    if read:
        assert len(open_checkpoint(folder).quantization.layers) == 14
        return
    with pytest.raises(FourfoldError, match=r"rotates activations while it runs \(algo_config"):
        open_checkpoint(folder)


def test_fused_experts_that_are_kept_are_listed_for_their_readers():
    layers = "model.layers.{}.mlp"
    infos = [
        *(
            TensorInfo(f"{layers}.experts.gate_up_proj".format(i), (4, 64, 64), torch.bfloat16, None, 0)
            for i in (0, 1)
        ),
        TensorInfo(layers.format(1) + ".experts.0.down_proj.weight", (64, 32), None, "mxfp4", 0),
        TensorInfo(layers.format(2) + ".conv1d.weight", (4, 1, 4), torch.bfloat16, None, 0),
    ]
    kept = kept_linears(infos)
    # those of layer 1 are cut apart in part, and a convolution is no expert
    assert kept == ["lm_head", "model.layers.0.mlp.experts"]
    quantization = Quantization(
        layers={"model.layers.1.mlp.experts.0.down_proj": LayerScheme(weight="mxfp4")}
    )
    settings = get_dialect("compressed-tensors").quantization_config(quantization, kept)
    assert settings is not None
    expression = r"re:.*model\.layers\.0\.mlp\.experts\..*"
    assert settings["ignore"] == ["lm_head", "model.layers.0.mlp.experts", expression]
    says_kept = get_dialect("compressed-tensors").says_kept
    assert says_kept(settings, "model.layers.0.mlp.experts.3.gate_proj")
    assert not says_kept(settings, "model.layers.1.mlp.experts.3.gate_proj")
    settings = get_dialect("quark").quantization_config(quantization, kept)
    assert settings is not None and settings["exclude"] == kept


JUNK = [None, 7, -1, 2.5, True, "", "re:(", "Linear", [], [1], ["Linear"], {}, {"a": 1}, {"weight": 3}]


def with_junk(value, source: random.Random):
    """``value`` with one place in it, at any depth, replaced or removed."""
    if isinstance(value, dict) and value and source.random() < 0.9:
        key = source.choice(sorted(value))
        if source.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: with_junk(value[key], source)}
    return source.choice(JUNK)


@pytest.mark.parametrize("dialect", ["compressed-tensors", "quark"])
def test_a_damaged_configuration_gives_nothing_but_our_error(tiny_llama, tmp_path, dialect):
    folder = quantize_folder(tiny_llama, tmp_path / "out", dialect, mixed, kv_cache="fp8")
    (folder / "fourfold.json").unlink()
    good = json.loads((folder / "config.json").read_text())
    refused = 0
    for seed in range(160):
        source = random.Random(seed)
        changed = {"quantization_config": with_junk(good["quantization_config"], source)}
        config = with_junk(good, source) if seed % 4 == 0 else good | changed
        (folder / "config.json").write_text(json.dumps(config))
        try:
            open_checkpoint(folder).card()
            refused += seed % 8 == 0 and not verify(folder).passed
        except FourfoldError:
            refused += 1
    assert 20 < refused < 160

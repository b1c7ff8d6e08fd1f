"""Mixtures of experts under calibrated passes: every expert is seen, counted, and ends up in its place."""

import json

import pytest
import torch
from compress_models import change_tensor, read_all
from safetensors.torch import save_file
from tiny_models import ARCHITECTURES, build_architecture

from fourfold.checkpoint import open_checkpoint
from fourfold.compress import Recipe, quantize
from fourfold.compress.calibrated.loop import LayerLoop
from fourfold.compress.calibrated.routing import ExpertTokens, Survey, summarise
from fourfold.compress.calibrated.skeleton import Skeleton
from fourfold.compress.calibrated.store import LayerStore
from fourfold.compress.calibration import CalibrationSet
from fourfold.compress.model import Entry, Model
from fourfold.compress.passes import gptq
from fourfold.compress.resolve import resolve
from fourfold.core.errors import FourfoldError
from fourfold.core.quantization import Quantization
from fourfold.formats import BlockTensor, get_format

MOE = [name for name, changes in ARCHITECTURES.items() if any("experts" in key for key in changes)]
TOKENS = torch.randint(2, 250, (4, 32), generator=torch.Generator().manual_seed(5))
CALIBRATION = CalibrationSet(TOKENS, "random", 5)


def recipe(*passes, **changes):
    return Recipe(name="test", rules=[{"weight": "mxfp4"}], passes=list(passes), **changes)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Each model is built when it is first asked for."""
    folder, built = tmp_path_factory.mktemp("moe"), {}

    def get(model_type, **changes):
        key = model_type + json.dumps(changes)
        if key not in built:
            built[key] = build_architecture(folder / str(len(built)), model_type, **changes)
        return built[key]

    return get


@pytest.fixture
def unloved(models):
    """A gpt-oss of one layer whose router sends expert 3 nothing, and by how much is no secret."""
    folder = models("gpt_oss", num_hidden_layers=1, layer_types=["full_attention"])
    change_tensor(
        folder, "model.layers.0.mlp.router.bias", lambda b: torch.tensor([0.0, 0, 0, -9]).to(b.dtype)
    )
    return folder


def work_on(folder, tmp_path, tokens=CALIBRATION, chosen="gptq"):
    asked = recipe(chosen)
    model = resolve(open_checkpoint(folder), asked).model
    loop = LayerLoop(model, asked, tokens, LayerStore(tmp_path), torch.device("cpu"))
    loop.start()
    return loop, loop.begin(0)


def dequantized(out):
    """A checkpoint's tensors without blocks, by logical name."""
    checkpoint = open_checkpoint(out)
    values = {name: checkpoint.load(name) for name in checkpoint.names()}
    return {n: v if isinstance(v, torch.Tensor) else v.dequantize(torch.bfloat16) for n, v in values.items()}


def in_the_layout_of_gpt_oss(values):
    """Experts put together as transformers' modeling_gpt_oss.py reads them."""
    found = {name: value for name, value in values.items() if ".experts." not in name}
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts"

        def every(leaf, stem=stem):
            return torch.stack([values[f"{stem}.{e}.{leaf}"] for e in range(4)])

        for kind, name in (("weight", ""), ("bias", "_bias")):
            both = torch.stack([every(f"gate_proj.{kind}"), every(f"up_proj.{kind}")], 2).flatten(1, 2)
            down = every(f"down_proj.{kind}")
            found[f"{stem}.gate_up_proj{name}"] = both.mT.contiguous() if kind == "weight" else both
            found[f"{stem}.down_proj{name}"] = down.mT.contiguous() if kind == "weight" else down
    return found


@torch.no_grad()
def logits(folder, tokens):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens).logits


@pytest.mark.parametrize("model_type", [*MOE, "qwen3_5_text"])
def test_gptq_rounds_every_expert_and_transformers_computes_with_the_result(models, tmp_path, model_type):
    source, out = models(model_type), tmp_path / "out"
    quantize(source, out, recipe("gptq"), calibration=CALIBRATION)
    expected = set(resolve(open_checkpoint(source), recipe("gptq")).model.quantization.layers)
    assert {n for n in open_checkpoint(out).quantization.layers} == expected
    quantize(source, tmp_path / "nearest", recipe("rtn"))
    errors = {}
    for folder in (out, tmp_path / "nearest"):
        values = dequantized(folder)
        values = in_the_layout_of_gpt_oss(values) if model_type == "gpt_oss" else values
        plain = folder.with_name(folder.name + "-plain")
        plain.mkdir()
        save_file(
            {n: v.contiguous() for n, v in values.items()}, plain / "model.safetensors", {"format": "pt"}
        )
        (plain / "config.json").write_bytes((source / "config.json").read_bytes())
        errors[folder.name] = (logits(plain, TOKENS) - logits(source, TOKENS)).square().mean().item()
    assert 0 < errors["out"] < errors["nearest"]


def test_a_router_that_a_recipe_rounds_is_rounded_to_nearest_and_told(models, tmp_path):
    """transformers multiplies with it, but not in a linear layer that passes could work on."""
    source, name = models("qwen3_moe"), "model.layers.1.mlp.gate"
    manifest = quantize(source, tmp_path / "out", recipe("gptq", keep_default=False), calibration=CALIBRATION)
    assert "3 weights are in no linear layer" in manifest.card.notes[0] and name in manifest.card.notes[0]
    written = open_checkpoint(tmp_path / "out").load(f"{name}.weight")
    assert isinstance(written, BlockTensor)
    nearest = get_format("mxfp4").quantize(read_all(source)[f"{name}.weight"])
    assert torch.equal(written.blocks, nearest.blocks)
    turned = recipe("block-rotation", "gptq", keep_default=False)
    with pytest.raises(FourfoldError, match=r"gate is to be rotated.*'model\.layers\.\*\.mlp\.gate'"):
        quantize(source, tmp_path / "turned", turned, calibration=CALIBRATION)


def test_matrices_of_many_experts_are_held_in_portions(models, tmp_path, monkeypatch):
    """Within 64 KiB go four of [64, 64] in float32; every linear layer is rounded all the same."""
    monkeypatch.setattr("fourfold.compress.passes.gptq.STATISTICS_BYTES", 64 * 1024)
    _, work = work_on(models("qwen3_moe"), tmp_path)
    options = gptq.Options()
    parts = gptq.portions(work, list(work.schemes), options)
    assert len(parts) > 2
    assert sorted(name for part in parts for name in part) == sorted(work.schemes)
    assert all(sum(4 * work.linears[n].in_features ** 2 for n in part) <= 64 * 1024 for part in parts)
    gptq.round_layer(work, options)
    assert work.blocks.keys() == work.schemes.keys()


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_tokens_are_counted_as_the_router_of_transformers_sends_them(models, tmp_path, model_type):
    from transformers import AutoModelForCausalLM

    folder, layer = models(model_type), 1
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    mlp = net.model.layers[layer].mlp
    chosen = []
    mlp.experts.register_forward_pre_hook(lambda m, args, kwargs: chosen.append(args[1]), with_kwargs=True)
    with torch.no_grad():
        net(TOKENS)
    loop, _ = work_on(folder, tmp_path)
    skeleton, (inputs, calls) = loop.skeleton, loop.skeleton.enter([TOKENS])
    first = skeleton.materialise(0)
    hidden = first(inputs[0], *calls[4][0].args, **calls[4][0].kwargs)
    loop._inputs = [hidden]
    loop._base_inputs = [hidden]
    work = loop.begin(layer)
    work.survey_experts()
    (found,) = work.expert_tokens
    assert found.experts == f"model.layers.{layer}.mlp.experts"
    assert found.tokens == torch.cat(chosen).flatten().bincount(minlength=4).tolist()


def test_a_starved_expert_is_shown_the_tokens_that_the_router_ranks_next(unloved, tmp_path):
    _, work = work_on(unloved, tmp_path)
    before = work.outputs(work.inputs)
    seen = {}
    name = "model.layers.0.mlp.experts.{}.up_proj"
    work.observe([name.format(e) for e in range(4)], lambda n, x: seen.update({n: x}))
    assert name.format(3) not in seen  # nothing is shown before the survey
    plain = {n: len(x) for n, x in seen.items()}
    work.survey_experts()
    (found,) = work.expert_tokens
    assert found.tokens[3] == 0
    assert found.enough == 64
    assert found.extra == {3: 64} | {e: 64 - n for e, n in enumerate(found.tokens) if e < 3 and n < 64}
    work.observe([name.format(e) for e in range(4)], lambda n, x: seen.update({n: x}))
    assert {n: len(x) for n, x in seen.items() if n in plain} == {
        n: max(count, 64) for n, count in plain.items()
    }
    # a linear layer of its own says which tokens they are
    router = work.module.mlp.router
    inputs = []
    handle = router.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    after = work.outputs(work.inputs)
    handle.remove()
    rank = router(inputs[0])[0].softmax(-1)[:, 3].topk(64).indices.sort().values
    assert torch.equal(seen[name.format(3)], inputs[0][rank])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_rows_of_both_models_are_the_same_tokens(models, tmp_path):
    _, work = work_on(models("qwen3_moe"), tmp_path)
    work.base_inputs = [x + torch.randn_like(x) for x in work.inputs]
    names = [n for n in work.linears if ".experts." in n]
    counts = {}

    def count(inputs):
        found = {}
        work.observe(names, lambda n, x: found.update({n: found.get(n, 0) + len(x)}), inputs)
        return found

    assert count(work.inputs) != count(work.base_inputs)
    work.survey_experts()
    counts = count(work.inputs)
    assert set(counts) == set(names)
    assert counts == count(work.base_inputs)


@pytest.mark.parametrize(
    ("model_type", "watched", "runs"),
    [
        ("gpt_oss", "self_attn.q_proj", set()),
        ("gpt_oss", "mlp.experts.1.up_proj", {1}),
        ("deepseek_v3", "mlp.experts.2.down_proj", {2}),
        ("deepseek_v3", "mlp.shared_experts.down_proj", {0, 1, 2, 3}),  # runs after them, and might need them
    ],
)
def test_experts_run_for_an_observation_only_when_they_must(models, tmp_path, model_type, watched, runs):
    loop, _ = work_on(models(model_type), tmp_path)
    work = loop.begin(1)
    work.survey_experts()
    ran = set()
    for index, expert in enumerate(work.module.mlp.experts):
        expert.up_proj.register_forward_pre_hook(lambda m, args, index=index: ran.add(index))
    seen = []
    work.observe([f"model.layers.1.{watched}"], lambda name, x: seen.append(len(x)))
    assert seen
    assert ran == runs
    work.outputs(work.inputs)
    assert ran == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "passes", [["gptq"], ["awq", "rtn"], ["smoothquant", "gptq"], [{"autoround": {"steps": 2}}]]
)
def test_an_expert_that_saw_no_token_is_rounded_and_named(unloved, tmp_path, passes):
    """With 32 tokens in all, no expert can have its 64."""
    few = CalibrationSet(TOKENS[:1], "random", 5)
    manifest = quantize(unloved, tmp_path / "out", recipe(*passes), calibration=few)
    notes = "\n".join(manifest.card.notes)
    assert "each of 4 experts 0 to" in notes
    assert "stayed starved" in notes
    assert "model.layers.0.mlp.experts.3 (0 of 64)" in notes
    values = dequantized(tmp_path / "out")
    assert all(value.isfinite().all() for value in values.values())
    weight = values["model.layers.0.mlp.experts.3.down_proj.weight"].float()
    original = read_all(unloved)["model.layers.0.mlp.experts.down_proj"][3].T.float()
    assert (weight - original).norm() < 0.4 * original.norm()
    written = json.loads((tmp_path / "out" / "fourfold.json").read_text())
    assert written["card"]["notes"] == manifest.card.notes
    assert written["calibration"]["starved_experts"] == {"model.layers.0.mlp.experts": [0, 1, 2, 3]}


def test_what_a_note_has_no_room_for_is_in_the_manifest():
    many = ExpertTokens(experts="mlp.experts", enough=64, tokens=[0] * 12)
    assert summarise([many])[-1].endswith("mlp.experts.7 (0 of 64) and 4 more, which fourfold.json lists.")


def test_a_router_that_shows_nothing_leaves_its_experts_starved(unloved, tmp_path):
    _, work = work_on(unloved, tmp_path)
    survey = Survey(work.module.mlp.experts)
    survey.see(torch.tensor([[0, 1]] * 100), None)
    found = survey.record("mlp.experts")
    assert found.tokens == [100, 100, 0, 0]
    assert found.still_starved == [2, 3]
    assert survey.plans()[0].extra == {}
    assert summarise([found])[-1].endswith("mlp.experts.2 (0 of 64), mlp.experts.3 (0 of 64).")


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "granitemoe"])
def test_experts_that_a_recipe_keeps_together_stay_so_unchanged(models, tmp_path, model_type):
    source = models(model_type)
    if model_type == "qwen3_moe":
        from compress_models import fuse_as_transformers

        source = fuse_as_transformers(source, tmp_path / "fused")
    keep = ["*.input_linear", "*.output_linear"] if model_type == "granitemoe" else ["*.experts*"]
    manifest = quantize(source, tmp_path / "out", recipe("gptq", keep=keep), calibration=CALIBRATION)
    before, after = read_all(source), dequantized(tmp_path / "out")
    assert before.keys() == after.keys()
    # nothing is told of the calibration of what was not rounded
    assert manifest.card.notes == [] and "expert_tokens" not in manifest.calibration
    fused = [n for n, v in before.items() if v.ndim == 3 and "conv" not in n]
    assert fused
    assert all(torch.equal(before[n], after[n]) for n in fused)


@pytest.mark.parametrize("passes", [["gptq"], ["awq", "rtn"], ["smoothquant", "gptq"], ["mse-scale"]])
def test_an_expert_that_nothing_can_be_shown_to_is_rounded_near_its_weights(
    unloved, tmp_path, monkeypatch, passes
):
    monkeypatch.setattr("fourfold.compress.calibrated.experts.find_router", lambda parent, experts: None)
    manifest = quantize(unloved, tmp_path / "out", recipe(*passes), calibration=CALIBRATION)
    assert "model.layers.0.mlp.experts.3 (0 of 64)" in manifest.card.notes[-1]
    original = read_all(unloved)["model.layers.0.mlp.experts.down_proj"][3].T.float()
    weight = dequantized(tmp_path / "out")["model.layers.0.mlp.experts.3.down_proj.weight"].float()
    assert (weight - original).norm() < 0.15 * original.norm()


def test_smoothing_reaches_experts_that_stay_together(models, tmp_path):
    """A shared expert is rounded, so the norm before it is divided, and the others must be multiplied."""
    from compress_models import fuse_as_transformers

    source = fuse_as_transformers(models("qwen3_next"), tmp_path / "fused")
    errors = {}
    for passes in (["gptq"], ["smoothquant", "gptq"]):
        out, plain = tmp_path / passes[0], tmp_path / f"{passes[0]}-plain"
        quantize(source, out, recipe(*passes, keep=["*.experts*"]), calibration=CALIBRATION)
        plain.mkdir()
        save_file(dequantized(out), plain / "model.safetensors", {"format": "pt"})
        (plain / "config.json").write_bytes((source / "config.json").read_bytes())
        errors[passes[0]] = (logits(plain, TOKENS) - logits(source, TOKENS)).square().mean().item()
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert not torch.equal(dequantized(tmp_path / "smoothquant")[name], read_all(source)[name])
    assert errors["smoothquant"] < 1.5 * errors["gptq"]


def test_a_large_model_costs_nothing_before_a_layer_is_asked_for():
    """The shapes of Qwen3-235B-A22B: 94 layers of 128 experts."""
    import resource
    import time

    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=4096, num_hidden_layers=94, num_attention_heads=64, num_key_value_heads=4,
        head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=1536, vocab_size=151936,
    ).to_dict()  # fmt: skip
    leaves = [f"self_attn.{p}_proj.weight" for p in "qkvo"]
    leaves += ["self_attn.q_norm.weight", "self_attn.k_norm.weight", "mlp.gate.weight"]
    leaves += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    leaves += [f"mlp.experts.{e}.{p}_proj.weight" for e in range(128) for p in ("gate", "up", "down")]
    names = [f"model.layers.{i}.{leaf}" for i in range(94) for leaf in leaves]
    from fourfold.checkpoint import TensorInfo

    infos = [TensorInfo(n, (1,), torch.bfloat16, None, 2) for n in [*names, "model.embed_tokens.weight"]]
    model = Model(config, {i.name: Entry(i, lambda: torch.zeros(1), i) for i in infos}, Quantization())
    memory, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    skeleton = Skeleton(model, torch.device("cpu"))
    assert time.process_time() - begin < 15
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200 * 1024
    assert len(skeleton) == 94
    assert skeleton.prefix(93) == "model.layers.93"

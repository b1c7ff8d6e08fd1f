"""Mixed precision within a budget: groups, costs, the choice, and checkpoints of several formats."""

import itertools

import numpy as np
import pytest
import torch
from compress_models import build_moe, change_tensor, tensor_bytes
from layer_at_work import build_model, tokens
from tiny_models import build_tiny_model

from fourfold.checkpoint import open_checkpoint
from fourfold.checkpoint.dialect import get_dialect
from fourfold.checkpoint.tensors import TensorInfo
from fourfold.checkpoint.verify import verify
from fourfold.compress import Recipe, load_recipe, plan, quantize
from fourfold.compress.budget.budgets import parse_budget
from fourfold.compress.budget.candidates import candidates
from fourfold.compress.budget.choose import Group, frontier, numel, within_bytes, within_cost
from fourfold.compress.budget.fit import fit_budget
from fourfold.compress.budget.groups import fused_groups
from fourfold.compress.budget.sensitivity import sensitivities
from fourfold.compress.calibrated.skeleton import Skeleton
from fourfold.compress.calibrated.whole import WholeModel
from fourfold.compress.model import plain
from fourfold.compress.resolve import open_source, resolve
from fourfold.core.errors import FourfoldError, UsageError
from fourfold.core.quantization import LayerScheme
from fourfold.formats import BlockTensor, get_format

CPU = torch.device("cpu")


def test_what_kernels_fuse_shares_a_format():
    layer = "model.layers.10."
    attention = [f"{layer}self_attn.{leaf}_proj" for leaf in "qkvo"]
    mlp = [f"{layer}mlp.{leaf}_proj" for leaf in ("gate", "up", "down")]
    experts = [f"model.layers.2.mlp.experts.{e}.{p}_proj" for e in range(2) for p in ("gate", "up", "down")]
    linear = [f"{layer}linear_attn.in_proj_{leaf}" for leaf in ("a", "b", "qkv", "z")]
    groups = fused_groups([*attention, *mlp, *experts, *linear])
    assert {frozenset(group) for group in groups} == {
        frozenset(attention[:3]),
        frozenset(attention[3:]),
        frozenset(mlp[:2]),
        frozenset(mlp[2:]),
        frozenset(experts),
        frozenset(linear[:2]),
        frozenset(linear[2:]),
    }
    assert groups[0][0].startswith("model.layers.2.")  # not 10 before 2


@pytest.mark.parametrize(
    "text, kind, value",
    [
        ("4.5bits", "bits", 4.5),
        ("5 bit", "bits", 5),
        ("1.2GB", "bytes", 1.2e9),
        ("800 MiB", "bytes", 800 * 2**20),
        ("kl=0.05", "kl", 0.05),
        ("KL = 1e-3", "kl", 1e-3),
    ],
)
def test_budgets_are_understood(text, kind, value):
    budget = parse_budget(text)
    assert (budget.kind, budget.value) == (kind, pytest.approx(value))


@pytest.mark.parametrize(
    "text", ["4.5", "0bits", "-4bits", "4.5 bytes", "kl=0", "kl0.1", "GB", "", "1e999GB"]
)
def test_other_budgets_are_refused(text):
    with pytest.raises(UsageError, match=r"4\.5bits"):
        parse_budget(text)


def random_groups(count: int) -> list[Group]:
    generator = torch.Generator().manual_seed(count)
    found = []
    for index in range(count):
        size = int(torch.randint(1, 9, (), generator=generator)) * 1024
        cost = sorted(torch.rand(2, generator=generator).tolist(), reverse=True)
        nbytes = {"small": size // 2, "middle": size, "kept": 2 * size}
        costs = {"small": cost[0], "middle": cost[1], "kept": 0.0}
        found.append(Group((f"m{index}",), size, nbytes, costs))
    return found


def test_the_programme_finds_what_trying_everything_finds():
    groups = random_groups(7)
    every = [
        (
            sum(g.nbytes[f] for g, f in zip(groups, forms, strict=True)),
            sum(g.cost[f] for g, f in zip(groups, forms, strict=True)),
        )
        for forms in itertools.product(("small", "middle", "kept"), repeat=7)
    ]
    for choice in frontier(groups, points=5):
        best = min(cost for nbytes, cost in every if nbytes <= choice.nbytes)
        assert choice.cost == pytest.approx(best, rel=1e-3, abs=1e-9)
        fewest = min(nbytes for nbytes, cost in every if cost <= choice.cost * 1.001)
        assert within_cost(groups, choice.cost * 1.001).nbytes == pytest.approx(fewest, rel=1e-3)


def test_the_frontier_falls():
    points = frontier(random_groups(12))
    assert len(points) > 5
    for before, after in itertools.pairwise(points):
        assert after.nbytes > before.nbytes and after.cost < before.cost


def test_the_solver_says_nothing(capfd):
    """These groups make HiGHS print a line of debugging."""
    draw = np.random.default_rng(1)
    groups = []
    for index in range(20):
        size, cost = int(draw.choice([65536, 131072, 98304, 393216])), 10 ** draw.normal(-3, 1)
        shares = [1.0, *(share * draw.lognormal(0, 0.3) for share in (0.06, 0.05, 0.045)), 0.0]
        nbytes = [size * 17 // 32, size * 25 // 32, size * 33 // 32, size + 512, 2 * size]
        costs = dict(zip("abcde", (cost * share for share in shares), strict=True))
        groups.append(Group((f"m{index}",), size, dict(zip("abcde", nbytes, strict=True)), costs))
    frontier(groups)
    assert capfd.readouterr().out == ""


def test_too_small_a_size_is_refused():
    groups = random_groups(3)
    smallest = numel(groups) / 2
    assert set(within_bytes(groups, smallest).formats) == {"small"}
    with pytest.raises(UsageError, match=r"4\.000 bits"):
        within_bytes(groups, smallest - 1)


def test_formats_are_those_that_the_dialect_can_store():
    weight = TensorInfo("model.layers.0.mlp.up_proj.weight", (64, 64), torch.bfloat16, None, 8192)
    schemes = {
        name: candidates(get_dialect(name), weight, LayerScheme(weight="mxfp4", scale_rule="even"))
        for name in ("compressed-tensors", "quark")
    }
    found = {name: [scheme.weight for scheme in those] for name, those in schemes.items()}
    assert found["compressed-tensors"] == ["mxfp4", "mxfp6-e2m3", "mxfp8-e4m3", "fp8-channel"]
    assert found["quark"] == ["mxfp4", "mxfp6-e2m3", "fp8-channel"]
    assert [scheme.scale_rule for scheme in schemes["quark"]] == ["even", "even", None]


def test_inputs_are_never_coarser_than_weights():
    weight = TensorInfo("model.layers.0.mlp.up_proj.weight", (64, 64), torch.bfloat16, None, 8192)
    scheme = LayerScheme(weight="mxfp4", activation="mxfp6-e2m3")
    found = candidates(get_dialect("compressed-tensors"), weight, scheme)
    assert {s.weight: s.activation for s in found} == {
        "mxfp4": "mxfp6-e2m3",
        "mxfp6-e2m3": "mxfp6-e2m3",
        "mxfp8-e4m3": "mxfp8-e4m3",
    }


def test_the_predicted_kl_is_near_the_measured(tmp_path):
    """Of one weight alone, where the second order must be right; by many labels, so that noise is small."""
    model = resolve(open_source(build_model(tmp_path / "m")), load_recipe("mxfp4")).model
    text = tokens(count=64, length=32)
    name = "model.layers.0.mlp.down_proj"
    schemes = {name: [LayerScheme(weight="mxfp6-e2m3"), LayerScheme(weight="mxfp4")]}
    costs = sensitivities(Skeleton(model, CPU), text, schemes)
    whole = WholeModel(Skeleton(model, CPU))
    with torch.no_grad():
        wanted = whole(text.token_ids).log_softmax(-1)
        weight = whole.linears[name].weight
        original = weight.clone()
        for form, predicted in costs[name].items():
            weight.copy_(get_format(form).fake_quantize(original))
            found = whole(text.token_ids).log_softmax(-1)
            measured = float((wanted.exp() * (wanted - found)).sum(-1).mean())
            assert predicted == pytest.approx(measured, rel=0.5)
    assert costs[name]["mxfp4"] > 4 * costs[name]["mxfp6-e2m3"]


def test_a_model_that_overflows_is_told(tmp_path):
    source = build_tiny_model(tmp_path / "m")
    change_tensor(source, "lm_head.weight", lambda weight: torch.full_like(weight, 3e38))
    with pytest.raises(FourfoldError, match="logits that are not finite"):
        fit_budget(source, "mxfp4", "compressed-tensors", "5bits", tokens(count=1))


@pytest.mark.parametrize("dialect", ["compressed-tensors", "quark"])
def test_the_chosen_recipe_keeps_to_its_budget(tmp_path, dialect):
    source = build_model(tmp_path / "m")
    fitted, record = fit_budget(source, "mxfp4", dialect, "5.5bits", tokens())
    chosen = record.points[record.chosen]
    assert 5 < chosen.bits <= 5.5 and len(chosen.groups) > 1
    assert sum(group.predicted_kl[group.format] for group in record.groups) == pytest.approx(
        chosen.predicted_kl
    )
    quantize(source, tmp_path / "out", fitted, dialect)
    assert verify(tmp_path / "out").passed
    made = open_checkpoint(tmp_path / "out")
    assert tensor_bytes(tmp_path / "out") == chosen.size_bytes
    for group in record.groups:
        formats = {made.info(f"{module}.weight").format for module in group.modules}
        assert formats == {None if group.format == "kept" else group.format}
    manifest = made.manifest
    assert manifest is not None and manifest.recipe is not None
    assert Recipe.model_validate(manifest.recipe) == fitted and fitted.uses == load_recipe("mxfp4").uses


def test_a_size_and_an_accuracy_are_kept_too(tmp_path):
    source = build_model(tmp_path / "m")
    _, record = fit_budget(source, "mxfp4", "compressed-tensors", "5bits", tokens())
    aim = record.points[len(record.points) // 2]
    fitted, by_size = fit_budget(source, "mxfp4", "compressed-tensors", f"{aim.size_bytes}B", tokens())
    assert by_size.points[by_size.chosen].size_bytes <= aim.size_bytes
    assert plan(source, fitted).output_bytes == by_size.points[by_size.chosen].size_bytes
    _, by_kl = fit_budget(source, "mxfp4", "compressed-tensors", f"kl={aim.predicted_kl}", tokens())
    assert by_kl.points[by_kl.chosen].predicted_kl <= aim.predicted_kl * 1.0001
    refused = {"4bits": "4.250 to 16.000", "1kB": "GB", "16bits": "Nothing needs", "kl=1e-12": "Nothing can"}
    for budget, reason in refused.items():
        with pytest.raises(UsageError, match=reason):
            fit_budget(source, "mxfp4", "compressed-tensors", budget, tokens())
    with pytest.raises(UsageError, match="rounds nothing"):
        fit_budget(source, "bf16", "compressed-tensors", "5bits", tokens())


def test_experts_of_a_layer_share_a_format_and_a_glob(tmp_path):
    source = build_moe(tmp_path / "m", "qwen3_moe")
    recipe = Recipe.model_validate({"name": "r", "rules": [{"weight": "mxfp4"}], "passes": ["gptq"]})
    fitted, record = fit_budget(source, recipe, "compressed-tensors", "6bits", tokens())
    assert [len(group.modules) for group in record.groups] == [12, 3, 1]
    assert "model.layers.0.mlp.experts.*" in [name for rule in fitted.rules for name in rule.modules]
    quantize(source, tmp_path / "out", fitted, calibration=tokens())
    assert verify(tmp_path / "out").passed
    made = open_checkpoint(tmp_path / "out")
    for group in record.groups:
        formats = {made.info(f"{module}.weight").format for module in group.modules}
        assert formats == {None if group.format == "kept" else group.format}


def test_names_that_part_what_kernels_fuse_are_told(tmp_path):
    source = build_tiny_model(tmp_path / "m")
    rules = [{"modules": ["*.q_proj"], "weight": "mxfp8-e4m3"}, {"weight": "mxfp4"}]
    recipe = Recipe.model_validate({"name": "by-hand", "rules": rules, "passes": ["rtn"]})
    (note,) = quantize(source, tmp_path / "a", recipe).card.notes
    assert note.startswith("model.layers.0.self_attn.k_proj, ")
    assert "have several formats, and 1 more such group." in note
    whole = recipe.model_copy(update={"keep": ["model.layers.0.*", "*.down_proj", "*.[qkv]_proj"]})
    assert not quantize(source, tmp_path / "b", whole).card.notes


@pytest.mark.parametrize("dialect", ["compressed-tensors", "quark"])
def test_formats_given_by_name_are_written_and_read_back(tmp_path, dialect):
    source = build_tiny_model(tmp_path / "m")
    recipe = Recipe.model_validate(
        {
            "name": "by-hand",
            "rules": [
                {"modules": ["*.self_attn.*"], "weight": "fp8-channel"},
                {"modules": ["*.mlp.*"], "weight": "mxfp4", "scale_rule": "even"},
            ],
            "keep": ["model.embed_tokens", "*.o_proj"],
            "passes": ["rtn"],
        }
    )
    quantize(source, tmp_path / "out", recipe, dialect)
    assert verify(tmp_path / "out").passed
    original, made = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    counts = {"fp8-channel": 0, "mxfp4": 0, None: 0}
    for name in original.names():
        value, form = made.load(name), made.info(name).format
        before = plain(original.load(name))
        counts[form] += 1
        if form is None:
            assert torch.equal(plain(value), before)
            continue
        assert isinstance(value, BlockTensor)
        wanted = get_format(form).fake_quantize(before)
        assert torch.equal(value.dequantize(torch.bfloat16), wanted)
    assert counts["fp8-channel"] == 6 and counts["mxfp4"] == 6
    assert made.info("model.embed_tokens.weight").format is None

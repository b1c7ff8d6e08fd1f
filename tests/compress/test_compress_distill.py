"""Weights trained through their rounding on the whole model's logits, and that whole model."""

from functools import partial

import pytest
import torch
from compress_models import read_all
from layer_at_work import at_work, build_model, recipe_of, run_passes, tokens

from fourfold.checkpoint import open_checkpoint
from fourfold.compress import quantize
from fourfold.compress.calibrated.author import continue_together
from fourfold.compress.calibrated.loop import LayerLoop
from fourfold.compress.calibrated.skeleton import Skeleton
from fourfold.compress.calibrated.store import LayerStore
from fourfold.compress.calibrated.whole import WholeModel
from fourfold.compress.calibration import CalibrationSet
from fourfold.compress.model import Model
from fourfold.compress.passes import distill
from fourfold.compress.pipeline import Change, check_recipe, prepare
from fourfold.compress.resolve import open_source, resolve
from fourfold.core.errors import FourfoldError, UsageError

TRAINED = {"steps": 4, "sequences": 2, "micro": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("model") / "tiny")


def prepared_by(model, recipe) -> Model:
    return prepare(recipe, resolve(open_source(model), recipe).model)


def skeleton_of(model, *passes, **formats) -> Skeleton:
    return Skeleton(prepared_by(model, recipe_of(*passes, **formats)), torch.device("cpu"))


def change_of(folder, store, *passes, calibration=None) -> tuple[LayerLoop, Change]:
    """What the passes before the last one do to a whole model, once they have learned."""
    recipe = recipe_of(*passes, activation="mxfp4")
    calibration = calibration or seen_twice()
    loop = LayerLoop(prepared_by(folder, recipe), recipe, calibration, LayerStore(store), torch.device("cpu"))
    loop.learn()
    return loop, partial(loop.change, loop.passes[:-1])


def seen_twice(count: int = 6) -> CalibrationSet:
    """The sequences that are held out are those that are learned from: it must get better on them."""
    ids = tokens(count).token_ids
    return CalibrationSet(torch.cat([ids, ids]), "twice", 0)


def learn(model, *before, activation=None, **options) -> dict[str, torch.Tensor]:
    chosen = distill.Options.model_validate(
        {"steps": 60, "sequences": 6, "holdout": 0.5, "lr": 2e-3, "norms": False, **options}
    )
    skeleton = skeleton_of(model, *before, "distill", activation=activation)
    return distill.learn(skeleton, seen_twice(), chosen, unchanged)


def unchanged(model: WholeModel) -> None:
    """No pass comes before."""


@pytest.mark.parametrize("tied", [False, True])
def test_the_whole_model_is_that_of_transformers(tmp_path, tied):
    from transformers import AutoModelForCausalLM

    folder = build_model(tmp_path / "tied", tie_word_embeddings=tied)
    ids = tokens(2).token_ids
    whole = WholeModel(skeleton_of(folder, "rtn"))
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(whole(ids), expected, rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in whole.layers.parameters())


@pytest.mark.parametrize("before", ["block-rotation", {"kl-rotation": TRAINED}], ids=["fixed", "trained"])
def test_a_rotated_model_computes_the_same(model, tmp_path, before):
    loop, change = change_of(model, tmp_path, before, "rtn")
    whole = WholeModel(loop.skeleton)
    ids = tokens(2).token_ids
    expected, weight = whole(ids), whole.linears["model.layers.0.mlp.up_proj"].weight.clone()
    change(whole)
    assert not torch.allclose(whole.linears["model.layers.0.mlp.up_proj"].weight, weight)
    torch.testing.assert_close(whole(ids), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rotation", ["block-rotation", {"kl-rotation": TRAINED}], ids=["fixed", "trained"])
def test_training_begins_where_the_rotation_ended(model, tmp_path, rotation):
    """The divergence before the first step is that of the recipe that rounds to nearest instead."""
    options = {"steps": 8, "sequences": 6, "holdout": 0.5, "lr": 1e-3}
    recipe = recipe_of(rotation, {"distill": options}, activation="mxfp4")
    quantize(model, tmp_path / "out", recipe, calibration=seen_twice())
    loop, change = change_of(model, tmp_path, rotation, "rtn")
    chosen = distill.Options.model_validate(options)
    first, least = distill.learn(loop.skeleton, seen_twice(), chosen, change)[distill.REPORT].tolist()
    base, whole = WholeModel(loop.skeleton), WholeModel(loop.skeleton)
    change(whole)
    distill.start(loop.skeleton, whole, chosen).latents.write()
    held = seen_twice().token_ids[-6:]
    assert first == pytest.approx(distill.divergence(base, whole, held, 6), rel=1e-4)
    assert least < first
    assert f"from {first:.4g} to {least:.4g}" in " ".join(open_checkpoint(tmp_path / "out").card().notes)


@pytest.mark.parametrize(
    ("before", "activation", "options"),
    [
        ([], None, {}),
        ([], None, {"own": 8, "micro": 3}),
        ([], None, {"norms": True, "lr": 1e-9, "norm_lr": 0.02, "steps": 20}),
    ],
    ids=["weights", "own-text", "norms"],
)
def test_the_divergence_falls(model, before, activation, options):
    first, least = learn(model, *before, activation=activation, **options)[distill.REPORT].tolist()
    assert least < (0.9 if options else 0.75) * first


def test_own_text_goes_on_from_runs_of_the_calibration_text(model):
    text, net = tokens(3).token_ids, WholeModel(skeleton_of(model, "distill"))
    written = continue_together(net, text, 10, seed=4)
    assert written.shape == (10, text.shape[1])
    assert torch.equal(written, continue_together(net, text, 10, seed=4))
    runs = {tuple(run.tolist()) for row in text for run in row.unfold(0, 8, 1)}
    assert all(tuple(row[:8].tolist()) in runs for row in written)
    half = text.shape[1] // 2
    assert not any(tuple(row[half:][:8].tolist()) in runs for row in written)


def test_a_step_that_leads_astray_is_not_kept(model):
    learned = learn(model, steps=2, checks=2, lr=30.0)
    first, least = learned[distill.REPORT].tolist()
    assert least == first
    skeleton = skeleton_of(model, "distill")
    student = distill.start(skeleton, WholeModel(skeleton), distill.Options())
    untrained = student.learned(student.snapshot())
    assert all(torch.equal(learned[name], value) for name, value in untrained.items() if ".norm" not in name)


def test_a_model_that_computes_no_numbers_is_told_before_the_first_step(model):
    def overflow(whole: WholeModel) -> None:
        whole.layers[0].get_submodule("mlp.down_proj").bias = torch.nn.Parameter(torch.tensor(torch.inf))

    with pytest.raises(FourfoldError, match=r"is nan before 'distill'"):
        distill.learn(skeleton_of(model, "distill"), tokens(), distill.Options(steps=1), overflow)


def test_what_is_learned_is_what_is_written_twice_over(model, tmp_path):
    options = {"steps": 30, "norm_lr": 0.02, "lr": 1e-3, "holdout": 0.5, "sequences": 6}
    recipe = recipe_of({"distill": options}, activation="mxfp8-e4m3")
    for out in ("a", "b"):
        quantize(model, tmp_path / out, recipe, calibration=seen_twice())
    first, second = read_all(tmp_path / "a"), read_all(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first | second)
    checkpoint = open_checkpoint(tmp_path / "a")
    assert any("held-out sequences" in note for note in checkpoint.card().notes)
    learned = distill.learn(
        skeleton_of(model, "distill", activation="mxfp8-e4m3"),
        seen_twice(),
        distill.Options.model_validate(options),
        unchanged,
    )
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(checkpoint.load(f"{name}.weight").blocks, learned[f"{name}.blocks"])
    norm = checkpoint.load("model.layers.1.input_layernorm.weight")
    assert torch.equal(norm, learned["model.layers.1:input_layernorm.weight.norm"].bfloat16())
    assert not torch.equal(norm, open_checkpoint(model).load("model.layers.1.input_layernorm.weight"))


def test_a_weight_that_another_pass_changed_is_refused(model, tmp_path):
    work = at_work(model, tmp_path, recipe_of("autoround"))
    work.learned = learn(model, steps=1, checks=1)
    work.linears["model.layers.0.mlp.up_proj"].weight.data *= 1.5
    with pytest.raises(FourfoldError, match=r"up_proj\.weight is not the weight that 'distill' trained"):
        run_passes(work, recipe_of("distill"))


def test_only_rotations_may_come_before():
    check_recipe(recipe_of("block-rotation", "distill"))
    check_recipe(recipe_of("kl-rotation", "distill"))
    with pytest.raises(UsageError, match=r"'smoothquant' before 'distill'.*block-rotation, .* may come"):
        check_recipe(recipe_of("smoothquant", "distill"))


def test_a_gpu_that_is_too_small_is_told(model, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore lines")

    monkeypatch.setattr(distill, "kl", full)
    with pytest.raises(FourfoldError, match=r"trained on 8 sequences of 32 tokens.*9 GiB.*Lower `micro`"):
        learn(model, steps=1)


def test_one_sequence_is_too_few(model):
    with pytest.raises(UsageError, match="at least two calibration sequences"):
        distill.learn(skeleton_of(model, "distill"), tokens(1), distill.Options.model_validate({}), unchanged)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_replayed_step_leaves_the_gradient_of_the_plain_one(model):
    skeleton = Skeleton(prepared_by(model, recipe_of("distill", activation="mxfp4")), torch.device("cuda"))
    base, student_model = WholeModel(skeleton), WholeModel(skeleton)
    student = distill.start(skeleton, student_model, distill.Options.model_validate({}))
    student.latents.write()
    descend = distill.descent(base, student_model, 6)
    gradients = []
    for seed in range(6):
        student.optimizer.zero_grad(set_to_none=False)
        descend(tokens(6, seed=seed % 2).token_ids)
        gradients.append(student.latents.values.grad.clone())
    assert descend.recordable
    for plain, replayed in zip(gradients[:2], gradients[4:], strict=True):
        scale = plain.abs().max()
        assert scale > 0 and (plain - replayed).abs().max() < 0.01 * scale
    assert not torch.allclose(gradients[4], gradients[5])

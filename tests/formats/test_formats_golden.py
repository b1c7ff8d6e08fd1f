"""Literal bytes, worked out by hand from the specifications, so that a change of layout cannot pass."""

import pytest
import torch

from fourfold.formats import BlockTensor, get_format

# every E2M1 value, then every tie between two of them, each sign
E2M1_VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
E2M1_TIES = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0, 0]


def first_bytes(tensor: BlockTensor, count: int) -> str:
    return bytes(tensor.blocks.flatten()[:count].tolist()).hex()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mxfp4_bytes(dtype):
    tensor = get_format("mxfp4").quantize(torch.tensor(E2M1_VALUES + E2M1_TIES).to(dtype), "floor")
    assert tensor.scales.tolist() == [127]
    assert first_bytes(tensor, 16) == "1032547698badcfe20426406a8caec0e"


@pytest.mark.parametrize(
    ("name", "values", "scale", "expected"),
    [
        # E2M3 codes 1, 8, 31, 32+31 (0.125, 1, 7.5, -7.5), 24 bits from the lowest
        ("mxfp6-e2m3", [0.125, 1, 7.5, -7.5], 127, "01f2fd"),
        # E3M2 codes 1, 12, 31, 32+31 (1/16, 1, 28, -28)
        ("mxfp6-e3m2", [0.0625, 1, 28, -28], 127, "01f3fd"),
        # the smallest subnormal, one, the largest, and a tie to even beside one
        ("mxfp8-e4m3", [2.0**-9, 1, 448, -1.0625], 127, "01387eb8"),
        ("mxfp8-e5m2", [2.0**-16, 1, 57344, -1.125], 127, "013c7bbc"),
        ("mxint8", [1 / 64, 1, 127 / 64, -127 / 64], 127, "01407f81"),
    ],
)
def test_mx_bytes(name, values, scale, expected):
    tensor = get_format(name).quantize(torch.tensor(values + [0.0] * (32 - len(values))), "floor")
    assert tensor.scales.tolist() == [scale]
    assert first_bytes(tensor, len(expected) // 2) == expected


@pytest.mark.parametrize(
    ("amax", "bytes_by_rule"),
    [
        # amax: exponent bytes of floor, even, rceil, ceil; one unit of E2M1's largest binade is byte 125 + f
        (1.0, (125, 125, 125, 125)),
        (1.0000001192092896, (125, 125, 125, 126)),
        (1.5, (125, 125, 125, 126)),
        (1.5000001192092896, (125, 125, 126, 126)),
        (1.7499998807907104, (125, 125, 126, 126)),
        (1.75, (125, 126, 126, 126)),
        (1.9999998807907104, (125, 126, 126, 126)),
        (2.0, (126, 126, 126, 126)),
        (2.0**-149, (0, 0, 0, 0)),
        (3.4028234663852886e38, (252, 253, 253, 253)),
        (0.0, (0, 0, 0, 0)),
        (float("inf"), (255, 255, 255, 255)),
        (float("nan"), (255, 255, 255, 255)),
    ],
)
def test_scale_rules_at_their_turns(amax, bytes_by_rule):
    block = torch.zeros(32)
    block[7] = -amax
    rules = ("floor", "even", "rceil", "ceil")
    found = tuple(int(get_format("mxfp4").quantize(block, rule).scales) for rule in rules)
    assert found == bytes_by_rule


def test_nvfp4_bytes():
    values = torch.zeros(32)
    values[:4] = torch.tensor([6.0, -3.0, 0.5, 1.0])
    values[16:18] = torch.tensor([0.75, -0.25])
    tensor = get_format("nvfp4").quantize(values)
    assert tensor.global_scale is not None
    # 6 / (448 * 6): the first block's scale is 448 (0x7e), the second's 448 / 8 = 56 (0x66)
    assert tensor.global_scale.item() == pytest.approx(1 / 448)
    assert bytes(tensor.scales.tolist()).hex() == "7e66"
    assert first_bytes(tensor, 2) == "d721"
    assert first_bytes(tensor, 9)[16:] == "c7"


def test_int4_bytes():
    values = torch.zeros(32)
    values[:6] = torch.tensor([3.75, -3.75, 0.25, 0.75, -0.5, 1.0])
    tensor = get_format("int4-g32").quantize(values)
    assert tensor.scales.tolist() == [0.5]
    # 7.5 -> 7, -7.5 -> -8 | ties 0.5 -> 0, 1.5 -> 2 | -1, 2, all in two's complement
    assert first_bytes(tensor, 3) == "87202f"


def test_fp8_bytes():
    rows = torch.tensor([[448.0, 1.0, -(2.0**-9)], [896.0, 1.0, 0.0]])
    channel = get_format("fp8-channel").quantize(rows)
    assert channel.scales.tolist() == [[1.0], [2.0]]
    assert first_bytes(channel, 6) == "7e38817e3000"
    whole = get_format("fp8-tensor").quantize(rows)
    assert whole.scales.item() == 2.0
    assert first_bytes(whole, 6) == "7630807e3000"

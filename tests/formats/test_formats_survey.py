"""The table of ``fourfold formats``: its figures are those of the formats, counted by hand here."""

import math

import pytest
import torch

from fourfold.core.errors import FourfoldError
from fourfold.formats import format_names, get_format
from fourfold.formats.numbers.survey import FormatSurvey, distributions, survey


@pytest.fixture(scope="module")
def matrices() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    gaussian = torch.randn(64, 128, generator=generator)
    spiky = gaussian * torch.where(torch.rand(64, 128, generator=generator) < 0.01, 20.0, 1.0)
    narrow = torch.randn(8, 96, generator=generator)
    return {
        "plain": gaussian.bfloat16(),
        "spiky": spiky.bfloat16(),
        "narrow": narrow,
        "zeros": torch.zeros(4, 128),
        "vector": torch.ones(128),
        "table": torch.ones(4, 128, dtype=torch.int32),
        "broken": torch.full((4, 128), torch.nan),
    }


@pytest.fixture(scope="module")
def result(matrices) -> FormatSurvey:
    return survey(matrices.items())


def test_every_format_has_a_row_and_survives_json(result):
    assert sorted(row.name for row in result.formats) == format_names()
    assert [r.bits_per_value for r in result.formats] == sorted(r.bits_per_value for r in result.formats)
    assert FormatSurvey.model_validate_json(result.model_dump_json()) == result


def test_neither_four_bit_format_wins_everywhere(result):
    rows = {row.name: row for row in result.formats}
    assert rows["mxfp4"].bits_per_value == rows["int4-g64"].bits_per_value == 4.25
    mxfp4, int4 = rows["mxfp4"].sqnr_db, rows["int4-g64"].sqnr_db
    assert set(mxfp4) == set(distributions())
    assert mxfp4["gaussian"] < int4["gaussian"]
    assert all(mxfp4[name] > int4[name] for name in mxfp4 if name != "gaussian")
    assert mxfp4["gaussian"] == pytest.approx(19.0, abs=0.1)


def test_the_checkpoint_figures_add_up(result, matrices):
    own = result.checkpoint
    assert own is not None
    assert (own.tensors, own.skipped) == (4, 3)
    assert own.values == 2 * 64 * 128 + 8 * 96 + 4 * 128
    assert own.nearer == {"mxfp4": 1, "int4-g64": 1} and own.equal == 1  # narrow is no multiple of 64
    for row in result.formats:
        fmt = get_format(row.name)
        held = [x.double() for x in matrices.values() if x.is_floating_point() and x.isfinite().all()]
        held = [x for x in held if x.ndim == 2 and x.shape[-1] % (fmt.block_size or 1) == 0]
        noise = sum((x - fmt.quantize(x.float()).dequantize()).square().sum() for x in held)
        signal = sum(x.square().sum() for x in held)
        assert row.checkpoint_tensors == len(held)
        assert row.checkpoint_sqnr_db == pytest.approx(10 * math.log10(signal / noise), abs=1e-3)


def test_ranges_are_reached(result):
    rows = {row.name: row for row in result.formats}
    assert (rows["mxfp4"].smallest_positive, rows["mxfp4"].largest) == (2.0**-128, 6 * 2.0**127)
    assert (rows["int4-g64"].smallest_positive, rows["int4-g64"].largest) == (2.0**-24, 7 * 65504.0)
    assert rows["fp8-tensor"].largest == torch.finfo(torch.float32).max
    assert rows["mxfp4"].block_range == 12


def test_a_tensor_of_another_dtype_is_refused():
    with pytest.raises(FourfoldError, match="float64"):
        survey([("x", torch.ones(32, 128, dtype=torch.float64))])

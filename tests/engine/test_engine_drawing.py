"""Tokens drawn in C++ are those of numpy's specification, for the same logits and the same number."""

import math

import numpy as np
import pytest

from fourfold.engine.drawing import Asked, Draw, draw, draw_all, logprobs, logprobs_all
from fourfold.kernels.cpu import native, set_threads, threads

pytestmark = pytest.mark.skipif(native is None, reason="the C++ extension was not built")

VOCABULARIES = [1, 2, 17, 255, 256, 257, 1000, 5003]
FILTERS = [
    {},
    {"temperature": 0.3},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 300, "temperature": 5.0},
    {"top_p": 1e-300},
    {"top_p": 0.9},
    {"top_p": 0.9999, "temperature": 2.0},
    {"min_p": 0.02},
    {"min_p": 1.0},
    {"top_k": 50, "top_p": 0.8},
    {"top_p": 0.95, "min_p": 0.1},
    {"top_k": 20, "top_p": 0.99, "min_p": 0.05, "temperature": 1.5},
]
LAST = math.nextafter(1.0, 0.0)  # the largest number there may be


def random_rows(count: int, vocabulary: int, scale: float = 3.0) -> np.ndarray:
    rng = np.random.default_rng(vocabulary)
    return (rng.standard_normal((count, vocabulary)) * scale).astype(np.float32)


def draw_from(rows: np.ndarray, row: int, uniform: float, **filters) -> Draw:
    return Draw(row, int(rows[row].argmax()), uniform, **filters)


def both(rows: np.ndarray, draws: list[Draw]) -> tuple[list[int], list[int]]:
    return draw_all(rows, draws), [draw(rows[one.row], one) for one in draws]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_same_tokens(vocabulary, filters):
    rows = random_rows(30, vocabulary)
    rows[::3, ::5] = -math.inf
    rows[:, 0] = 1.0  # never nothing but -inf
    numbers = np.random.default_rng(1).random(len(rows))
    ours, spec = both(rows, [draw_from(rows, i, float(u), **filters) for i, u in enumerate(numbers)])
    assert ours == spec


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("uniform", [0.0, 1e-300, 0.5, LAST])
def test_what_has_no_chance_is_never_drawn(filters, uniform):
    rows = np.full((3, 700), -math.inf, dtype=np.float32)
    rows[0, 300:400] = rows[1, 699] = rows[2, 0] = 0.0
    ours, spec = both(rows, [draw_from(rows, i, uniform, **filters) for i in range(3)])
    assert ours == spec
    assert 300 <= ours[0] < 400 and ours[1:] == [699, 0]


@pytest.mark.parametrize("uniform", np.linspace(0, LAST, 9))
@pytest.mark.parametrize(
    "filters", [{"top_k": 3}, {"top_p": 0.5}, {"top_p": 0.251}, {"top_k": 2, "top_p": 0.3}, {"min_p": 1.0}]
)
def test_of_equal_tokens_top_k_keeps_all_and_top_p_the_first(filters, uniform):
    rows = np.full((1, 900), -90.0, dtype=np.float32)
    equal = [7, 200, 301, 302, 303, 640, 641, 899]
    rows[0, equal] = 2.0
    (ours,), (spec,) = both(rows, [draw_from(rows, 0, float(uniform), **filters)])
    assert ours == spec
    kept = math.ceil(filters.get("top_p", 1.0) * len(equal))
    assert ours == equal[int(uniform * kept)]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_row_gives_the_token_that_broke_it(broken):
    rows = random_rows(2, 600)
    rows[1, 417] = broken
    ours, spec = both(rows, [draw_from(rows, i, 0.5, top_p=0.9) for i in range(2)])
    assert ours == spec
    assert ours[1] == 417
    assert draw_all(np.full((1, 5), -np.inf, np.float32), [Draw(0, 0, 0.5)]) == [0]


def test_neither_batch_nor_threads_matter():
    rows = random_rows(16, 4999)
    draws = [draw_from(rows, i, i / 16, **FILTERS[i % len(FILTERS)]) for i in range(16)]
    before, found = threads(), []
    try:
        for count in (1, 3):
            set_threads(count)
            found.append(draw_all(rows, draws))
    finally:
        set_threads(before)
    alone = [draw_all(rows[one.row][None], [one._replace(row=0)])[0] for one in draws]
    assert found[0] == found[1] == alone


def test_rows_may_be_wider_than_the_vocabulary():
    wide = random_rows(4, 320)
    wide[:, 300:] = 1e9
    draws = [draw_from(wide[:, :300], i, 0.7) for i in range(4)]
    assert draw_all(wide[:, :300], draws) == draw_all(np.ascontiguousarray(wide[:, :300]), draws)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("count", [0, 1, 20])
@pytest.mark.parametrize("scale", [0.1, 4.0, 60.0])
def test_the_same_logprobs(vocabulary, count, scale):
    rows = random_rows(6, vocabulary, scale)
    asked = [Asked(i, (i * 37) % vocabulary, count) for i in range(6)]
    for one, (chosen, top) in zip(asked, logprobs_all(rows, asked), strict=True):
        spec, spec_top = logprobs(rows[one.row], one)
        assert chosen == pytest.approx(spec, abs=3e-5, rel=1e-6)
        assert [token for token, _ in top] == [token for token, _ in spec_top]
        assert [value for _, value in top] == pytest.approx([v for _, v in spec_top], abs=3e-5, rel=1e-6)


def test_logprobs_where_there_are_none():
    rows = random_rows(3, 300)
    rows[0, 5] = math.nan
    rows[1, 6] = -math.inf
    rows[2, :] = -math.inf
    rows[2, 9] = 0.0
    asked = [Asked(0, 1, 2), Asked(1, 6, 0), Asked(2, 9, 3)]
    (nan, none), (impossible, _), (sure, top) = logprobs_all(rows, asked)
    assert math.isnan(nan) and none == [] and impossible == -math.inf
    assert (sure, top) == (0.0, [(9, 0.0), (0, -math.inf), (1, -math.inf)])


@pytest.mark.parametrize("row", [-1, 2])
def test_rows_that_are_not_there_are_refused(row):
    with pytest.raises(ValueError, match="no such row"):
        draw_all(random_rows(2, 10), [Draw(row, 0, 0.5)])
    with pytest.raises(ValueError, match="no such row"):
        logprobs_all(random_rows(2, 10), [Asked(row, 0, 0)])
    with pytest.raises(ValueError, match="no such token"):
        logprobs_all(random_rows(2, 10), [Asked(0, row + 11, 0)])
    with pytest.raises(ValueError, match="no such token"):
        draw_all(random_rows(2, 10), [Draw(0, 10, 0.5)])

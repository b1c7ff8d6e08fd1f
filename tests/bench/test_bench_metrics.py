"""Metrics against values computed by hand, and what must hold for any requests."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.bench.metric import METRICS, duration_s, error_rate, measure_all, metrics_in_order
from fourfold.core.records import RequestRecord


def request(
    start: float, times: list[float], end: float | None = None, error: str | None = None, prompt: int = 10
):
    return RequestRecord(
        request_id="r",
        prompt_tokens=prompt,
        output_tokens=len(times),
        start_s=start,
        token_times_s=times,
        end_s=times[-1] if end is None else end,
        error=error,
    )


# sent at 0 and 1 s; tokens at 0.5 0.6 0.8 and at 1.1 1.4 2.0; the run lasts from 0 to 2.0 s
PAIR = [request(0.0, [0.5, 0.6, 0.8]), request(1.0, [1.1, 1.4, 2.0])]

BY_HAND = {
    "ttft_ms_mean": 300.0,  # 500 and 100
    "ttft_ms_p50": 300.0,
    "ttft_ms_p90": 460.0,  # 100 + 0.9 * 400
    "ttft_ms_p99": 496.0,
    "tpot_ms_mean": 300.0,  # 300 / 2 = 150 and 900 / 2 = 450
    "tpot_ms_p50": 300.0,
    "tpot_ms_p90": 420.0,
    "itl_ms_mean": 300.0,  # 100 200 300 600
    "itl_ms_p50": 250.0,
    "itl_ms_p90": 510.0,  # position 2.7 of 0..3: 300 + 0.7 * 300
    "e2e_ms_mean": 900.0,  # 800 and 1000
    "e2e_ms_p99": 998.0,
    "user_speed_tok_s_mean": (2 / 0.3 + 2 / 0.9) / 2,
    "user_speed_tok_s_p10": 2 / 0.9 + 0.1 * (2 / 0.3 - 2 / 0.9),
    "output_throughput_tok_s": 3.0,  # 6 tokens in 2 s
    "total_throughput_tok_s": 13.0,  # and 20 prompt tokens
    "request_throughput_req_s": 1.0,
    "error_rate": 0.0,
}


@pytest.mark.parametrize(("key", "expected"), BY_HAND.items())
def test_by_hand(key, expected):
    assert measure_all(PAIR)[key] == pytest.approx(expected)


def test_failed_requests_take_time_but_give_no_tokens_and_no_latency():
    failed = request(0.0, [0.1, 0.2], end=4.0, error="HTTP 503")
    metrics = measure_all([*PAIR, failed])
    assert metrics["output_throughput_tok_s"] == pytest.approx(6 / 4)
    assert metrics["ttft_ms_mean"] == pytest.approx(300)
    assert metrics["error_rate"] == pytest.approx(1 / 3)


def test_nothing_to_say_is_absent_and_never_zero():
    assert measure_all([request(0.0, [], end=1.0, error="refused")]) == {"error_rate": 1.0}
    single = measure_all([request(0.0, [0.5])])
    assert "ttft_ms_mean" in single and "tpot_ms_mean" not in single and "itl_ms_mean" not in single
    assert error_rate([]) == 1.0 and duration_s([]) == 0.0


def test_every_metric_says_what_it_is():
    for name, metric in zip(METRICS.names(), map(METRICS.get, METRICS.names()), strict=True):
        assert metric.name == name.replace("-", "_")
        assert metric.better in ("higher", "lower") and metric.unit and metric.definition.endswith(".")
        assert metric.name.endswith(("_ms", "_tok_s", "_req_s", "_rate"))
    assert [m.rank for m in metrics_in_order()] == sorted(m.rank for m in metrics_in_order())


def test_every_key_is_declared():
    declared = set().union(*(metric.keys() for metric in metrics_in_order()))
    assert set(measure_all(PAIR)) == declared


times = st.floats(0.001, 10)


@st.composite
def requests(draw, tokens: int | None = None):
    """Finished requests with tokens in order, all of one length when ``tokens`` is given."""
    length = st.integers(2, 6) if tokens is None else st.just(tokens)
    made = []
    for _ in range(draw(st.integers(1, 6))):
        clock = start = draw(st.floats(0, 10))
        stamps = [clock := clock + draw(times) for _ in range(draw(length))]
        made.append(request(start, stamps, end=stamps[-1] + draw(times)))
    return made


@settings(deadline=None, max_examples=40)
@given(requests())
def test_percentiles_are_ordered_and_latencies_nest(made):
    m = measure_all(made)
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        assert m[f"{name}_p50"] <= m[f"{name}_p90"] * (1 + 1e-9) <= m[f"{name}_p99"] * (1 + 1e-9)
    assert m["ttft_ms_mean"] <= m["e2e_ms_mean"]
    assert m["output_throughput_tok_s"] <= m["total_throughput_tok_s"]
    assert m["user_speed_tok_s_p1"] <= m["user_speed_tok_s_p10"] * (1 + 1e-9)


@settings(deadline=None, max_examples=40)
@given(requests(tokens=4))
def test_equal_lengths_tie_the_latencies_together(made):
    m = measure_all(made)
    assert m["itl_ms_mean"] == pytest.approx(m["tpot_ms_mean"])
    assert m["e2e_ms_mean"] == pytest.approx(m["ttft_ms_mean"] + 3 * m["tpot_ms_mean"])


@settings(deadline=None, max_examples=40)
@given(requests(), st.floats(0.1, 10), st.floats(0, 100), st.randoms())
def test_clock_and_order_do_not_matter_but_speed_does(made, factor, shift, random):
    moved = [
        request(
            r.start_s * factor + shift,
            [t * factor + shift for t in r.token_times_s],
            r.end_s * factor + shift,
        )
        for r in made
    ]
    random.shuffle(moved)
    before, after = measure_all(made), measure_all(moved)
    for key, value in before.items():
        scaled = value * factor if "_ms_" in key else value / factor if key != "error_rate" else value
        assert after[key] == pytest.approx(scaled, rel=1e-6)

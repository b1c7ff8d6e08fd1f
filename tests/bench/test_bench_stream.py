"""Counting tokens in streams as different servers write them."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.bench.stream import StreamReading, error_text


def sse(*events) -> bytes:
    lines = [e if isinstance(e, str) else json.dumps(e) for e in events]
    return b"".join(f"data: {line}\n\n".encode() for line in lines)


def choice(text="x", finish=None, **more):
    return {"choices": [{"text": text, "finish_reason": finish}], **more}


def usage(tokens, prompt=5):
    return {"prompt_tokens": prompt, "completion_tokens": tokens}


VLLM = [
    choice(usage=usage(1)),
    choice(usage=usage(3)),
    choice("", "length", usage=usage(4)),
    {"choices": [], "usage": usage(4)},
]
LLAMA_CPP = [
    choice(timings={"predicted_n": 1}),
    choice(timings={"predicted_n": 3}),
    choice("", "length", usage=usage(4), timings={"predicted_n": 4}),
]
PLAIN = [choice(), choice(), choice(), choice("", "length"), {"choices": [], "usage": usage(3)}]
LAST_WITH_TEXT = [choice(), choice(), choice("x", "length"), {"choices": [], "usage": usage(3)}]


def read(events, step_s=1.0) -> StreamReading:
    reading = StreamReading()
    for i, event in enumerate([*events, "[DONE]"]):
        reading.feed(sse(event), i * step_s)
    return reading


@pytest.mark.parametrize(
    ("events", "expected"),
    [(VLLM, [0, 1, 1, 2]), (LLAMA_CPP, [0, 1, 1, 2]), (PLAIN, [0, 1, 2]), (LAST_WITH_TEXT, [0, 1, 2])],
    ids=[
        "running usage",
        "running timings",
        "final usage, closing chunk",
        "final usage, last chunk with text",
    ],
)
def test_exact_counts(events, expected):
    reading = read(events)
    assert reading.token_times_s() == expected
    assert (reading.prompt_tokens, reading.finished, reading.estimated) == (5, True, False)


def test_chunks_of_unknown_size_are_spread_and_said_so():
    reading = read([choice(), choice(), choice("x", "length"), {"choices": [], "usage": usage(9)}])
    times = reading.token_times_s()
    assert len(times) == 9 and times[0] == 0 and times[-1] == 2 and times == sorted(times)
    assert reading.estimated


def test_surplus_chunks_keep_first_and_last():
    reading = read([choice()] * 5 + [{"choices": [], "usage": usage(3)}])
    assert reading.token_times_s() == [0, 2, 4] and reading.estimated


def test_no_counts_at_all():
    reading = read([choice(), choice(), choice("", "stop")])
    assert reading.token_times_s() == [0, 1] and reading.completion_tokens is None


def test_error_in_the_stream():
    reading = read([choice(), {"error": {"message": "out of memory"}}])
    assert reading.error == "the server ended the stream: out of memory"
    assert "not a JSON object" in str(read(["{broken"]).error)
    assert "not a JSON object" in str(read(["[1]"]).error)


def test_cached_prompt_tokens_are_seen():
    seen = usage(1) | {"prompt_tokens_details": {"cached_tokens": 4}}
    assert read([choice(), {"choices": [], "usage": seen}]).cached_tokens == 4


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 40), max_size=30), st.booleans())
def test_network_pieces_do_not_matter(cuts, carriage_return):
    data = b": a comment\n\n" + sse(*VLLM, "[DONE]")
    data = data.replace(b"\n", b"\r\n") if carriage_return else data
    reading, at = StreamReading(), 0
    for cut in [*cuts, len(data)]:
        reading.feed(data[at : at + cut], 0.0)
        at += cut
    reading.feed(data[at:], 0.0)
    assert reading.counted == 4 and reading.finished and reading.error is None


@pytest.mark.parametrize(
    "body", [{"error": {"message": "m"}}, {"error": "m"}, {"message": "m"}, {"detail": "m"}, "m"]
)
def test_error_shapes(body):
    assert error_text(body) == "m"

"""Whatever a client sends, the answer is OpenAI's error shape with a right status, and never a 500."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fourfold.server.schemas import ChatRequest, CompletionRequest

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


def error_of(response) -> dict:
    """The error of a response, whose shape is checked."""
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text and body["error"]["message"]
    return body["error"]


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"prompt": "a", "max_toke": 3}, "max_toke", "unknown_parameter"),
        (
            {"prompt": "a", "stream_options": {"x": 1}, "stream": True},
            "stream_options.x",
            "unknown_parameter",
        ),
        ({}, "prompt", "missing_required_parameter"),
        ({"prompt": None}, "prompt", "missing_required_parameter"),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": [1, "a"]}, "prompt", "invalid_value"),
        ({"prompt": [[]]}, "prompt", "invalid_value"),
        ({"prompt": [-1]}, "prompt", "invalid_value"),
        ({"prompt": {"text": "a"}}, "prompt", "invalid_value"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"prompt": "a", "temperature": -1}, "temperature", "invalid_value"),
        ({"prompt": "a", "top_p": 0}, "top_p", "invalid_value"),
        ({"prompt": "a", "n": 0}, "n", "invalid_value"),
        ({"prompt": "a", "stop": [""]}, "stop.0", "invalid_value"),
        ({"prompt": "a", "stop_token_ids": [-5]}, "stop_token_ids.0", "invalid_value"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "invalid_value"),
        ({"prompt": "a", "seed": 2**64}, "seed", "invalid_value"),
        ({"prompt": "a", "min_tokens": 30, "max_tokens": 20}, "min_tokens", "invalid_value"),
        ({"prompt": "a", "echo": True, "stream": True}, "echo", "unsupported_parameter"),
        ({"prompt": "a", "best_of": 3}, "best_of", "unsupported_parameter"),
        ({"prompt": "a", "logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
        ({"prompt": "a", "stream_options": {}}, "stream_options", "unsupported_parameter"),
        ({"prompt": "a", "max_tokens": 512}, "prompt", "context_length_exceeded"),
        ({"prompt": "a" * 600}, "prompt", "context_length_exceeded"),
        ({"prompt": ["a"] * 2000, "n": 100}, "n", None),
        ({"prompt": [999], "stream": True}, None, None),
    ],
)
def test_bad_completions_are_400_and_name_the_parameter(live, body, param, code):
    response = live.complete(**body)
    assert response.status_code == 400
    error = error_of(response)
    assert (error["param"], error["code"]) == (param, code)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, "messages.0.tool_calls"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs.chat_template"),
    ],
)
def test_bad_chats_are_400_and_name_the_parameter(live, change, param):
    response = live.http.post("/v1/chat/completions", json=CHAT | change)
    assert response.status_code == 400
    assert error_of(response)["param"] == param


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"null",
        b'"text"',
        b'{"prompt": "a",}',
        b'{"prompt": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b"\xff\xfe",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "model": "\\ud800"}',
        b'{"prompt": "a", "\\ud800": 1}',
        b"[" * 100_000,
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_bodies_that_are_no_request(live, content):
    headers = {"content-type": "application/json"}
    response = live.http.post("/v1/completions", content=content, headers=headers)
    assert response.status_code in {400, 404}
    error_of(response)


def test_other_content_types_paths_and_methods(live):
    assert (
        "application/json"
        in error_of(live.http.post("/v1/completions", content=b'{"prompt": "a"}'))["message"]
    )
    assert live.http.get("/v1/completions").status_code == 405
    error_of(live.http.get("/v1/completions"))
    response = live.http.get("/v1/embeddings")
    assert response.status_code == 404
    error_of(response)


def test_a_request_the_engine_refuses_harms_no_other(start_server):
    small = start_server(kv_cache_tokens=64, max_batch_size=2)
    refused = small.complete(prompt=[9, 9], max_tokens=80)
    assert refused.status_code == 400 and error_of(refused)["code"] == "context_length_exceeded"
    assert small.complete(prompt=[[9, 9], [999]], max_tokens=8).status_code == 400
    assert small.engine.stats.running == small.engine.stats.waiting == 0
    assert small.complete(prompt=[9, 9], max_tokens=8).status_code == 200


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3),
    max_leaves=5,
)


def bodies(schema, base: dict):
    """Objects with some of the schema's keys set to anything, over a base that alone would be good."""
    some = st.dictionaries(st.sampled_from(sorted(schema.model_fields)), values, max_size=3)
    return some.map(lambda changes: base | changes)


FUZZ = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@FUZZ
@given(bodies(CompletionRequest, {"prompt": [9, 8], "max_tokens": 2}))
def test_fuzzed_completions_never_fail_inside(live, body):
    check_fuzzed(live, "/v1/completions", body)


@FUZZ
@given(bodies(ChatRequest, CHAT))
def test_fuzzed_chats_never_fail_inside(live, body):
    check_fuzzed(live, "/v1/chat/completions", body)


def check_fuzzed(live, path: str, body: dict) -> None:
    """200 or a well-formed refusal, and a server that still serves."""
    headers = {"content-type": "application/json"}
    response = live.http.post(path, content=json.dumps(body), headers=headers)
    assert response.status_code in {200, 400, 404}, response.text
    if response.status_code == 200:
        assert live.http.get("/health").status_code == 200
    else:
        error_of(response)


@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 1e-300},
        {"temperature": 100, "top_p": 1e-9},
        {"repetition_penalty": 0.01},
        {"repetition_penalty": 100, "frequency_penalty": 2, "presence_penalty": -2},
        {"top_k": 2**31 - 1, "min_p": 1.0},
        {"min_p": 1e-300, "top_p": 1e-300},
        {"seed": -(2**63), "n": 3},
        {"logprobs": 20, "min_tokens": 8, "stop_token_ids": [2**31 - 1, 0]},
    ],
)
def test_extreme_sampling_parameters_leave_the_server_alive(live, extreme):
    response = live.complete(prompt="extreme", max_tokens=8, **extreme)
    assert response.status_code == 200, response.text
    assert live.http.get("/health").status_code == 200

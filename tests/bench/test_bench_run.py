"""Whole runs against a real small server: what is sent, what is recorded, what is refused."""

import json

import pytest

from fourfold.bench import BenchPlan, run, summarise
from fourfold.core.errors import FourfoldError, UsageError
from fourfold.core.records import RunRecord


def plan(**changes) -> BenchPlan:
    return BenchPlan(
        **({"profiles": ["chat"], "concurrencies": [2], "scale": 1 / 16, "requests": 6} | changes)
    )


def single(url, out, **changes) -> RunRecord:
    [(path, record)] = run(url, plan(**changes), out)
    assert RunRecord.model_validate_json(path.read_text()) == record
    return record


def test_a_run_is_exact_and_recorded(small_server, tmp_path):
    app, url = small_server
    app.first_token_s, app.token_s = 0.05, 0.01
    seen = []
    [(path, record)] = run(
        url + "/v1/", plan(), tmp_path, lambda settings, done, total: seen.append((done, total))
    )
    assert path == tmp_path / "chat-c2.json" and not list(tmp_path.glob("*.tmp"))
    assert [r.error for r in record.requests] == [None] * 6
    assert all(r.prompt_tokens == 8 and r.output_tokens == len(r.token_times_s) == 8 for r in record.requests)
    assert all(r.start_s < r.token_times_s[0] <= r.token_times_s[-1] <= r.end_s for r in record.requests)
    assert record.metrics["ttft_ms_p50"] >= 50 and record.metrics["tpot_ms_p50"] >= 10
    assert record.metrics["e2e_ms_p50"] >= 50 + 7 * 10
    assert 0 < record.metrics["output_throughput_tok_s"] <= 2 * 8 / (0.05 + 7 * 0.01)
    assert (record.excluded, record.error_rate, record.model, record.model_name) == (
        False,
        0.0,
        None,
        "small",
    )
    assert app.most_in_flight == 2 and seen[-1] == (6, 6)


def test_requests_ask_for_exact_lengths_and_differ(small_server, tmp_path):
    app, url = small_server
    single(url, tmp_path)
    _probe, *warmup_and_measured = app.bodies
    assert len(warmup_and_measured) == 2 + 6
    for body in warmup_and_measured:
        assert body["ignore_eos"] is True and body["temperature"] == 0 and body["stream"] is True
        assert body["min_tokens"] == body["max_tokens"] == 8
        assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert len({tuple(b["prompt"]) for b in warmup_and_measured}) == 8


def test_several_profiles_and_concurrencies(small_server, tmp_path):
    _, url = small_server
    runs = list(run(url, plan(profiles=["chat", "document"], concurrencies=[1, 3], requests=None), tmp_path))
    assert [p.name for p, _ in runs] == [
        "chat-c1.json",
        "chat-c3.json",
        "document-c1.json",
        "document-c3.json",
    ]
    assert [r.settings.requests for _, r in runs] == [8, 8, 8, 8]
    assert runs[2][1].settings.input_tokens == 128
    summary = summarise(url, runs)
    assert [line.file for line in summary.runs] == [p.name for p, _ in runs]
    assert summary.runs[1].metrics == runs[1][1].metrics


@pytest.mark.parametrize("names_the_field", [True, False])
@pytest.mark.parametrize(
    "refuses",
    [
        {"continuous_usage_stats"},
        {"stream_options"},
        {"ignore_eos", "min_tokens"},
        {"stream_options", "min_tokens"},
    ],
    ids=lambda fields: "+".join(sorted(fields)),
)
def test_fields_a_server_refuses_are_left_out_and_noted(small_server, tmp_path, refuses, names_the_field):
    app, url = small_server
    app.refuses, app.names_the_field = frozenset(refuses), names_the_field
    record = single(url, tmp_path)
    assert record.error_rate == 0 and all(r.output_tokens == 8 for r in record.requests)
    for name in refuses:
        # giving up stream_options also gives up what is inside it
        assert any(f"refused {name}" in note for note in record.notes) or name not in app.bodies[-1]
    if names_the_field:
        assert not any(
            "refused" in n and not any(f"refused {f}:" in n for f in refuses) for n in record.notes
        )


def test_a_server_without_counts_is_noted(small_server, tmp_path):
    app, url = small_server
    app.refuses = frozenset({"stream_options"})
    record = single(url, tmp_path)
    assert "The server reports no token counts: each chunk was counted as one token." in record.notes


def test_large_chunks_with_running_counts_are_exact(small_server, tmp_path):
    app, url = small_server
    app.tokens_per_chunk, app.token_s = 4, 0.02
    record = single(url, tmp_path)
    for r in record.requests:
        first, second = r.token_times_s[:4], r.token_times_s[4:]
        assert len(set(first)) == len(set(second)) == 1 and second[0] > first[0]
    assert not any("estimate" in note for note in record.notes)


def test_large_chunks_without_running_counts_are_an_estimate(small_server, tmp_path):
    app, url = small_server
    app.tokens_per_chunk, app.honours_continuous_usage = 4, False
    record = single(url, tmp_path)
    assert all(r.output_tokens == 8 and r.error is None for r in record.requests)
    assert any("ITL is an estimate" in note for note in record.notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra_prompt_tokens": 1}, "sent 8 prompt tokens, the server counted 9"),
        ({"stops_after": 3}, "asked for 8 output tokens, got 3"),
    ],
)
def test_wrong_counts_are_errors(small_server, tmp_path, change, message):
    app, url = small_server
    vars(app).update(change)
    record = single(url, tmp_path)
    assert {r.error for r in record.requests} == {message}
    assert record.excluded and record.error_rate == 1 and record.metrics == {"error_rate": 1.0}


def test_a_stream_that_breaks_off_is_an_error(small_server, tmp_path):
    app, url = small_server
    app.breaks_after = 1  # the test request is answered, nothing else is
    record = single(url, tmp_path, warmup=0)
    assert all(r.error and r.error.startswith("RemoteProtocolError") for r in record.requests)
    assert [r.output_tokens for r in record.requests] == [1] * 6 and record.excluded
    app.breaks_after = 0
    with pytest.raises(FourfoldError, match="broke off a test request"):
        single(url, tmp_path)


@pytest.mark.parametrize(("requests", "failing", "excluded"), [(20, 10, False), (6, 3, True)])
def test_more_than_ten_percent_errors_exclude(small_server, tmp_path, requests, failing, excluded):
    app, url = small_server
    app.fail_every = failing  # counted from the probe on, which is request 1
    record = single(url, tmp_path, requests=requests, warmup=0)
    failed = [r.error for r in record.requests if r.error]
    assert set(failed) == {"HTTP 503: too busy"}
    assert record.error_rate == len(failed) / requests and record.excluded is excluded
    assert record.metrics["output_throughput_tok_s"] > 0


def test_what_the_server_tells_is_used(small_server, tmp_path):
    app, url = small_server
    card = {
        "name": "tiny",
        "architecture": "LlamaForCausalLM",
        "parameters": 1000,
        "weight_format": "mxfp4",
        "size_bytes": 600,
        "bits_per_weight": 4.8,
        "notes": ["weights were once rounded"],
    }
    app.entry = {"fourfold": card, "vocab_size": 64, "max_model_len": 100}
    record = single(url, tmp_path)
    assert (
        record.model and record.model.name == "tiny" and record.model.notes == ["weights were once rounded"]
    )
    assert all(16 <= i < 57 for body in app.bodies[1:] for i in body["prompt"])
    with pytest.raises(UsageError, match="'generate' needs 136 tokens a request; 'small' takes 100"):
        single(url, tmp_path, profiles=["generate"])
    app.entry = {"fourfold": {"name": "of another version"}}
    assert any("of another version" in n for n in single(url, tmp_path / "b").notes)


def test_another_models_record_is_not_overwritten(small_server, tmp_path):
    app, url = small_server
    single(url, tmp_path)
    single(url, tmp_path)  # the same model may be measured again
    app.entry = {"id": "other"}
    with pytest.raises(UsageError, match="Give every model its own --out folder"):
        single(url, tmp_path)
    (tmp_path / "chat-c2.json").write_text("a letter")
    with pytest.raises(UsageError, match="is no run of 'other'"):
        single(url, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"concurrencies": [0]}, "--concurrency 0"),
        ({"requests": 0}, "--requests 0"),
        ({"seed": -1}, "--seed -1"),
        ({"profiles": []}, "at least one profile"),
        ({"profiles": ["talk"]}, "Unknown profile 'talk'"),
    ],
)
def test_plans_that_make_no_sense(tmp_path, change, message):
    with pytest.raises(UsageError, match=message):
        list(run("http://127.0.0.1:9", plan(**change), tmp_path))


def test_unknown_model_and_strange_servers(small_server, tmp_path):
    app, url = small_server
    with pytest.raises(FourfoldError, match="does not serve 'x'; it serves: small"):
        single(url, tmp_path, model="x")
    app.refuses = frozenset({"prompt"})
    with pytest.raises(FourfoldError, match="refuses a plain request of four token ids"):
        single(url, tmp_path)
    with pytest.raises(FourfoldError, match="lists no model"):
        single(url + "/elsewhere", tmp_path)
    with pytest.raises(UsageError, match="is no URL"):
        single("http://host:port", tmp_path)


def test_stopping_keeps_what_is_finished(small_server, tmp_path):
    _, url = small_server

    def interrupt(settings, done, total):
        if settings.concurrency == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(run(url, plan(concurrencies=[1, 2]), tmp_path, interrupt))
    assert [p.name for p in tmp_path.iterdir()] == ["chat-c1.json"]
    assert json.loads((tmp_path / "chat-c1.json").read_text())["kind"] == "fourfold.run/1"

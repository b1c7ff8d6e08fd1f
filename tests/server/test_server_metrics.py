"""/metrics is Prometheus text that says what happened."""

from prometheus_client.parser import text_string_to_metric_families

ASK = {"prompt": [9, 8, 7], "max_tokens": 5, "ignore_eos": True}


def test_counts_are_exact(start_server):
    server = start_server()
    assert server.complete(**ASK, n=2).status_code == 200
    assert server.complete(**ASK, stream=True).text.endswith("data: [DONE]\n\n")
    assert server.complete(prompt=[]).status_code == 400
    families = {f.name: f for f in text_string_to_metric_families(server.http.get("/metrics").text)}
    requests = {tuple(s.labels.values()): s.value for s in families["fourfold_requests"].samples}
    assert requests[("/v1/completions", "200")] == 2 and requests[("/v1/completions", "400")] == 1
    assert server.metric("fourfold_prompt_tokens_total") == 6
    assert server.metric("fourfold_generation_tokens_total") == 15
    assert server.metric("fourfold_time_to_first_token_seconds_count") == 3
    assert server.metric("fourfold_inter_token_latency_seconds_count") == 12
    itl_s = [s.value for s in families["fourfold_inter_token_latency_seconds"].samples if "le" in s.labels]
    assert itl_s == sorted(itl_s) and itl_s[-1] == 12, "each bucket holds what the smaller ones hold"
    assert families["fourfold_requests_running"].samples[0].value == 0
    assert families["fourfold_requests_waiting"].samples[0].value == 0
    assert families["fourfold_kv_cache_usage_ratio"].type == "gauge"
    assert families["fourfold_preemptions"].type == "counter"


def test_preemptions_show(start_server):
    server = start_server(kv_cache_tokens=64, max_batch_size=4)
    assert server.complete(prompt=[9, 8, 7], n=3, max_tokens=40, ignore_eos=True).status_code == 200
    assert server.metric("fourfold_preemptions_total") == server.engine.stats.preemptions > 0


def test_apps_do_not_share_metrics(start_server):
    first, second = start_server(), start_server()
    assert first.complete(**ASK).status_code == 200
    assert second.metric("fourfold_generation_tokens_total") == 0


def test_drafts_show(start_server):
    server = start_server(speculative_tokens=4)
    song = [9, 8, 7, 6, 5] * 8
    assert server.complete(prompt=song, max_tokens=60, ignore_eos=True, temperature=0).status_code == 200
    stats = server.engine.stats
    assert server.metric("fourfold_draft_tokens_total") == stats.draft_tokens > 0
    assert server.metric("fourfold_accepted_draft_tokens_total") == stats.accepted_draft_tokens
    assert server.metric("fourfold_steps_total") == stats.steps
    assert server.metric("fourfold_generation_tokens_total") == 60

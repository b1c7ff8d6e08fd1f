"""``/metrics`` for Prometheus: what clients waited for, what the engine holds.

Latencies are taken when a token is handed to the HTTP side, counted from the arrival of the request; the
engine's own figures are read from its stats at the moment of scraping. One registry for each app, so that
several servers live in one process.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from fourfold.engine.requests import EngineStats

TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
ITL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class EngineCollector(Collector):
    """The engine's stats as gauges and counters, read when scraped."""

    def __init__(self, stats: Callable[[], EngineStats]):
        self.stats = stats

    def collect(self) -> Iterable[Metric]:
        """One family for each figure."""
        now = self.stats()
        gauges = {
            "requests_running": ("Requests in the current batch", now.running),
            "requests_waiting": ("Requests that wait for a place in the batch", now.waiting),
            "kv_cache_usage_ratio": ("Share of the KV cache held by unfinished requests", now.kv_usage),
        }
        counters = {
            "generation_tokens": ("Tokens written", now.generated_tokens),
            "preemptions": ("Requests put back because the KV cache was full", now.preemptions),
            "prefix_hit_tokens": ("Prompt tokens found in the prefix cache", now.prefix_hit_tokens),
            "steps": ("Forward passes of the engine", now.steps),
            "draft_tokens": ("Tokens that were tried ahead of their turn", now.draft_tokens),
            "accepted_draft_tokens": ("Tokens tried ahead that came true", now.accepted_draft_tokens),
        }
        for name, (help_text, value) in gauges.items():
            yield GaugeMetricFamily(f"fourfold_{name}", help_text, value)
        for name, (help_text, value) in counters.items():
            yield CounterMetricFamily(f"fourfold_{name}", help_text, value)


class Latencies(Collector):
    """A histogram of seconds that is cheap to add to: one thread adds, so nothing is locked."""

    def __init__(self, name: str, help_text: str, buckets_s: Sequence[float]):
        self.name, self.help_text, self.buckets_s = name, help_text, buckets_s
        self.counts, self.sum_s = [0] * (len(buckets_s) + 1), 0.0

    def observe(self, seconds: float) -> None:
        """Add one."""
        self.counts[bisect_left(self.buckets_s, seconds)] += 1
        self.sum_s += seconds

    def collect(self) -> Iterable[Metric]:
        """The histogram, each bucket with all that is in smaller ones."""
        bounds = [*map(str, self.buckets_s), "+Inf"]
        buckets = list(zip(bounds, accumulate(self.counts), strict=True))
        yield HistogramMetricFamily(self.name, self.help_text, buckets, self.sum_s)


class ServerMetrics:
    """The counters and histograms of one app."""

    def __init__(self, stats: Callable[[], EngineStats]):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "fourfold_requests", "Answered requests", ["endpoint", "status"], registry=self.registry
        )
        self.prompt_tokens = Counter("fourfold_prompt_tokens", "Tokens read", registry=self.registry)
        self.ttft_s = Latencies(
            "fourfold_time_to_first_token_seconds",
            "From the arrival of the request to its first token",
            TTFT_BUCKETS_S,
        )
        self.itl_s = Latencies(
            "fourfold_inter_token_latency_seconds", "From one token of a choice to its next", ITL_BUCKETS_S
        )
        self.registry.register(self.ttft_s)
        self.registry.register(self.itl_s)
        self.registry.register(EngineCollector(stats))

    def render(self) -> bytes:
        """The Prometheus text of this moment."""
        return generate_latest(self.registry)


class LatencyWatch:
    """Counts and times the tokens of one request, choice by choice, from the request's arrival on."""

    def __init__(self, metrics: ServerMetrics):
        self.metrics = metrics
        self.start_s = time.perf_counter()
        self.last_s: dict[int, float] = {}

    def token(self, choice: int) -> bool:
        """A token of this choice has arrived now. Returns whether it is the first."""
        now, last_s = time.perf_counter(), self.last_s.get(choice)
        self.last_s[choice] = now
        if last_s is None:
            self.metrics.ttft_s.observe(now - self.start_s)
        else:
            self.metrics.itl_s.observe(now - last_s)
        return last_s is None

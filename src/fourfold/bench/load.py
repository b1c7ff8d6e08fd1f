"""Closed-loop load: a fixed number of users, each sending its next request when the last one was answered.

Concurrency is therefore constant until requests run out; the tail, in which users finish one by one, is
inside the measured time, as in the common tools. Warm-up requests come first, at the same concurrency and
prompt length but with short answers, and are thrown away: they open connections and let the server
allocate.
"""

import asyncio
import time
from collections.abc import Callable, Sequence

from fourfold.bench.client import Client
from fourfold.core.records import RequestRecord

WARMUP_OUTPUT_TOKENS = 8

Progress = Callable[[int, int], None]
"""Called with requests done and requests in all."""


async def closed_loop(
    client: Client, prompts: Sequence[Sequence[int]], output_tokens: int, concurrency: int, progress: Progress
) -> list[RequestRecord]:
    """Send every prompt, never more than ``concurrency`` at a time; records come in the order of the
    prompts."""
    waiting = iter(enumerate(prompts))
    records: dict[int, RequestRecord] = {}

    async def user() -> None:
        for index, prompt in waiting:
            records[index] = await client.complete(f"request-{index}", prompt, output_tokens)
            progress(len(records), len(prompts))

    async with asyncio.TaskGroup() as users:
        for _ in range(min(concurrency, len(prompts))):
            users.create_task(user())
    return [records[i] for i in range(len(prompts))]


async def measured_loop(
    client: Client,
    warmup: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]],
    output_tokens: int,
    concurrency: int,
    progress: Progress,
) -> list[RequestRecord]:
    """Warm up, set the clock to zero, measure."""
    short = min(output_tokens, WARMUP_OUTPUT_TOKENS)
    await closed_loop(client, warmup, short, concurrency, lambda done, total: None)
    client.estimated = client.uncounted = client.cached_tokens = 0
    client.zero_s = time.perf_counter()
    return await closed_loop(client, prompts, output_tokens, concurrency, progress)

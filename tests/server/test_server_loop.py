"""Clients that leave, engines that fail, servers that end."""

import asyncio
import threading
import time

import httpx
import pytest
from server_harness import eventually

from fourfold.engine import Request, TokenOutput
from fourfold.server.loop import EngineLoop

LONG = {"prompt": [9, 8, 7], "max_tokens": 500, "ignore_eos": True}


def slow_down(live, monkeypatch) -> None:
    """A tiny model's long answer is over before anyone can leave; let each of its tokens take five ms."""
    step = live.engine.step
    monkeypatch.setattr(live.engine, "step", lambda: (time.sleep(0.005), step())[1])


def idle(live) -> bool:
    stats = live.engine.stats
    return stats.running == stats.waiting == stats.kv_tokens_used == 0


def test_leaving_a_stream_aborts_its_request(live, monkeypatch):
    slow_down(live, monkeypatch)
    before = live.engine.stats.aborted
    with live.http.stream("POST", "/v1/completions", json=LONG | {"stream": True, "n": 2}) as response:
        lines = response.iter_lines()
        for _ in range(4):
            next(lines)
        assert live.engine.stats.running == 2
    assert eventually(lambda: live.engine.stats.aborted == before + 2)
    assert idle(live)


def test_leaving_before_a_whole_answer_aborts_it(live, monkeypatch):
    slow_down(live, monkeypatch)
    before = live.engine.stats.aborted
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{live.url}/v1/completions", json=LONG | {"n": 8}, timeout=0.3)
    assert eventually(lambda: live.engine.stats.aborted == before + 8)
    assert idle(live)


def test_a_failed_step_is_a_500_then_503_with_the_reason(start_server, monkeypatch):
    broken = start_server()
    step, calls = broken.engine.step, []

    def fails_later():
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("secret detail")
        return step()

    monkeypatch.setattr(broken.engine, "step", fails_later)
    with broken.http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as stream:
        events = stream.read().decode().split("\n\n")
    assert stream.status_code == 200 and "engine_failed" in events[-3] and events[-2] == "data: [DONE]"
    health = broken.http.get("/health")
    assert health.status_code == 503 and "RuntimeError" in health.json()["reason"]
    assert "secret" not in health.text + "".join(events)
    refused = broken.complete(**LONG)
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "engine_failed"


def test_a_step_that_fails_before_the_first_token_is_a_500(start_server, monkeypatch):
    broken = start_server()
    monkeypatch.setattr(broken.engine, "step", lambda: 1 / 0)
    for stream in (True, False):
        status = broken.complete(**LONG, stream=stream).status_code
        assert status == (500 if stream else 503), (
            "the first request meets the failure, the second hears of it"
        )


def test_an_add_that_breaks_is_a_500_for_that_request_only(start_server, monkeypatch):
    server = start_server()
    with monkeypatch.context() as patch:
        patch.setattr(server.engine, "add", lambda request: {}["x"])
        assert server.complete(prompt="a").status_code == 500
    assert server.complete(prompt="a").status_code == 200
    assert server.http.get("/health").status_code == 200


def test_shutting_down_refuses_the_new_and_finishes_the_old(start_server, monkeypatch):
    server = start_server()
    slow_down(server, monkeypatch)
    answers = []
    old = threading.Thread(target=lambda: answers.append(server.complete(**LONG | {"max_tokens": 100})))
    old.start()
    assert eventually(lambda: server.engine.stats.running == 1)
    server.loop.drain()
    refused = server.complete(prompt="a")
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
    assert server.http.get("/health").json()["status"] == "shutting_down"
    old.join(20)
    assert answers[0].json()["usage"]["completion_tokens"] == 100


def test_stop_ends_what_runs_after_the_grace(start_server, monkeypatch):
    server = start_server()
    slow_down(server, monkeypatch)
    answers = []
    old = threading.Thread(target=lambda: answers.append(server.complete(**LONG)))
    old.start()
    assert eventually(lambda: server.engine.stats.running == 1)
    server.loop.stop(grace_s=0)
    old.join(10)
    assert answers[0].status_code == 503
    assert idle(server)


class ThreeTokens:
    """An engine that answers every request with three tokens, and remembers how many each step was for."""

    def __init__(self):
        self.left: dict[str, int] = {}
        self.steps: list[int] = []

    def add(self, request: Request) -> None:
        self.left[request.request_id] = 3

    def abort(self, request_id: str) -> None:
        self.left.pop(request_id, None)

    def step(self) -> list[TokenOutput]:
        self.steps.append(len(self.left))
        self.left = {name: left - 1 for name, left in self.left.items()}
        outputs = [
            TokenOutput(name, 5, "", None, None, None if n else "stop") for name, n in self.left.items()
        ]
        self.left = {name: left for name, left in self.left.items() if left}
        return outputs


async def answered(loop: EngineLoop, names: str, after_s: float = 0.0) -> None:
    await asyncio.sleep(after_s)
    async for _ in loop.submit([Request(name, [1]) for name in names]):
        pass


def steps_after(together: str, *later: str) -> list[int]:
    """Requests ``together`` are answered; then ``later`` come, each 20 ms after the one before."""
    engine = ThreeTokens()
    loop = EngineLoop(engine)

    async def ask() -> None:
        await answered(loop, together)
        await asyncio.gather(*(answered(loop, names, i * 0.02) for i, names in enumerate(later)))

    asyncio.run(ask())
    loop.stop()
    assert engine.steps[:3] == [len(together)] * 3
    return engine.steps[3:]


def test_those_who_were_answered_together_are_waited_for(monkeypatch):
    monkeypatch.setattr("fourfold.server.loop.RETURN_S", 5.0)
    assert steps_after("abc", "d", "e", "f") == [3] * 3


def test_nobody_is_waited_for_who_was_not_answered_just_before(monkeypatch):
    monkeypatch.setattr("fourfold.server.loop.RETURN_S", 60.0)
    start_s = time.monotonic()
    assert steps_after("a", "b") == [1] * 3
    assert time.monotonic() - start_s < 30


def test_those_who_do_not_come_back_are_not_waited_for_long(monkeypatch):
    monkeypatch.setattr("fourfold.server.loop.RETURN_S", 0.05)
    assert steps_after("abc", "d") == [1] * 3


def test_nor_are_they_waited_for_twice(monkeypatch):
    monkeypatch.setattr("fourfold.server.loop.RETURN_S", 1.0)
    engine, start_s = ThreeTokens(), time.monotonic()
    loop = EngineLoop(engine)

    async def ask() -> None:
        for names in ("abc", "d", "e", "f"):
            await answered(loop, names)

    asyncio.run(ask())
    loop.stop()
    assert engine.steps == [3] * 3 + [1] * 9
    assert time.monotonic() - start_s < 1.9

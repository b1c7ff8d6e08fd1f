"""A real engine behind a real uvicorn on a loopback port, in a thread of the test process."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import httpx
import pytest
import uvicorn
from openai import OpenAI

from fourfold.engine import Engine, EngineConfig
from fourfold.server.app import create_app
from fourfold.server.launch import Server, take_port
from fourfold.server.loop import EngineLoop


@dataclass
class LiveServer:
    """One engine, its loop, and the HTTP server over them."""

    engine: Engine
    loop: EngineLoop
    url: str
    server: Server
    http: httpx.Client = field(init=False)

    def __post_init__(self):
        self.http = httpx.Client(base_url=self.url, timeout=30)

    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=30)

    def complete(self, **body) -> httpx.Response:
        return self.http.post("/v1/completions", json=body)

    def metric(self, name: str) -> float:
        """The sum of a metric's samples as /metrics tells them."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split()[0] == name)


def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    """Whether ``condition`` becomes true in time."""
    deadline = time.monotonic() + timeout_s
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return met


@pytest.fixture(scope="session")
def start_server(tiny_llama) -> Iterator[Callable[..., LiveServer]]:
    """Starts servers over the tiny llama; all of them end with the session."""
    running: list[tuple[Server, threading.Thread]] = []

    def start(**config) -> LiveServer:
        engine = Engine.load(tiny_llama, EngineConfig(threads=1, **config))
        loop = EngineLoop(engine)
        listener = take_port("127.0.0.1", 0)
        settings = uvicorn.Config(create_app(engine, loop), log_level="critical", timeout_graceful_shutdown=2)
        server = Server(settings, loop, "ready")
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
        thread.start()
        running.append((server, thread))
        assert eventually(lambda: server.started)
        return LiveServer(engine, loop, f"http://127.0.0.1:{listener.getsockname()[1]}", server)

    yield start
    for server, _ in running:
        server.should_exit = True
    for _, thread in running:
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def live(start_server) -> LiveServer:
    """One server for all tests that leave it as they found it."""
    return start_server()

"""What the server's tests share: a live server and patience."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx
from openai import OpenAI

from fourfold.engine import Engine
from fourfold.server.launch import Server
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

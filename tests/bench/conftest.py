"""A real, small OpenAI-like server: an ASGI app behind uvicorn, with real delays and real sockets."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn


@dataclass
class SmallServer:
    """Behaviour of a server, to be set by a test; what it was asked lies in ``bodies``."""

    first_token_s: float = 0.0
    token_s: float = 0.0
    tokens_per_chunk: int = 1
    refuses: frozenset[str] = frozenset()
    names_the_field: bool = True
    honours_continuous_usage: bool = True
    sends_usage: bool = True
    closing_chunk: bool = False
    extra_prompt_tokens: int = 0
    stops_after: int | None = None
    fail_every: int | None = None
    spared: int = 0
    refusal: str = "too busy"
    breaks_after: int | None = None
    entry: dict[str, Any] = field(default_factory=dict)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] == "/v1/models":
            entry = {"id": "small", "object": "model", "owned_by": "test"} | self.entry
            return await reply(send, 200, {"object": "list", "data": [entry]})
        if scope["path"] != "/v1/completions":
            return await reply(send, 404, {"detail": "no such page"})
        data = b""
        while True:
            message = await receive()
            data += message.get("body", b"")
            if not message.get("more_body"):
                break
        body = json.loads(data)
        refused = self.refused_field(body)
        if refused:
            text = (
                f"Unrecognized request argument supplied: {refused}"
                if self.names_the_field
                else "bad request"
            )
            return await reply(send, 400, {"error": {"message": text}})
        self.bodies.append(body)
        if self.fail_every and len(self.bodies) > self.spared and len(self.bodies) % self.fail_every == 0:
            return await reply(send, 503, {"error": {"message": self.refusal}})
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await self.stream(body, send)
        finally:
            self.in_flight -= 1

    def refused_field(self, body: dict[str, Any]) -> str | None:
        present = set(body) | set(body.get("stream_options", {}))
        return next(iter(sorted(present & self.refuses)), None)

    async def stream(self, body: dict[str, Any], send) -> None:
        options = body.get("stream_options", {})
        continuous = options.get("continuous_usage_stats") and self.honours_continuous_usage
        prompt, total = len(body["prompt"]) + self.extra_prompt_tokens, body["max_tokens"]
        total = min(total, self.stops_after or total)
        await send({"type": "http.response.start", "status": 200, "headers": SSE})
        await asyncio.sleep(self.first_token_s)
        written = 0
        while written < total:
            if written:
                await asyncio.sleep(self.token_s)
            written = min(total, written + self.tokens_per_chunk)
            finish = "length" if written == total and not self.closing_chunk else None
            event: dict[str, Any] = {"choices": [{"index": 0, "text": "x", "finish_reason": finish}]}
            if continuous:
                event["usage"] = usage(prompt, written)
            await send_event(send, event)
            if self.breaks_after is not None and len(self.bodies) > self.breaks_after:
                raise RuntimeError("the server falls over")
        if self.closing_chunk:
            await send_event(send, {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        if options.get("include_usage") and self.sends_usage:
            await send_event(send, {"choices": [], "usage": usage(prompt, total)})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


SSE = [(b"content-type", b"text/event-stream")]


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def send_event(send, event: dict[str, Any]) -> None:
    body = b"data: " + json.dumps(event).encode() + b"\n\n"
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def reply(send, status: int, body: dict[str, Any]) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})


@contextmanager
def running(app: SmallServer) -> Iterator[str]:
    """The base URL of ``app`` behind uvicorn in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def small_server():
    """``(app, url)`` of a running small server; change the app's fields to change its behaviour."""
    app = SmallServer()
    with running(app) as url:
        yield app, url

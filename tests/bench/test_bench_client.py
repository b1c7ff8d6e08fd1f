"""One request against servers that end connections when it suits them."""

import asyncio
import json

import httpx

from fourfold.bench.client import Client
from fourfold.bench.endpoint import Endpoint


def answer() -> bytes:
    """A stream of two tokens, as HTTP."""
    events: list = [{"choices": [{"text": "x", "index": 0, "finish_reason": None}]} for _ in range(2)]
    events += [{"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 2}}]
    body = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
    body += b"data: [DONE]\n\n"
    head = f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def outcomes(answers_per_connection: int, requests: int) -> tuple[list[str | None], int]:
    """The errors of some requests, one after the other, and how many connections they took."""
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        for turn in range(answers_per_connection + 1):
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
            await reader.readexactly(int(length.split(b":")[1]))
            if turn < answers_per_connection:
                writer.write(answer())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, httpx.AsyncClient(base_url=url) as http:
        client = Client(http, Endpoint(url, "m"))
        records = [await client.complete(str(i), [1, 2, 3, 4], 2) for i in range(requests)]
    return [record.error for record in records], connections


def test_a_kept_connection_that_is_closed_unanswered_is_tried_once_more():
    assert asyncio.run(outcomes(answers_per_connection=1, requests=3)) == ([None] * 3, 3)


def test_a_server_that_never_answers_is_an_error():
    errors, connections = asyncio.run(outcomes(answers_per_connection=0, requests=1))
    assert errors[0] is not None and "RemoteProtocolError" in errors[0]
    assert connections == 2

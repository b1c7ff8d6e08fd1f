"""One request against servers that end connections when it suits them."""

import asyncio
import json

import pytest

from fourfold.bench.client import Client
from fourfold.bench.endpoint import Endpoint
from fourfold.bench.run import open_http


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
    async with server, open_http(url, 30, None) as http:
        client = Client(http, Endpoint(url, "m"))
        records = [await client.complete(str(i), [1, 2, 3, 4], 2) for i in range(requests)]
    return [record.error for record in records], connections


def test_a_connection_is_kept():
    assert asyncio.run(outcomes(answers_per_connection=3, requests=3)) == ([None] * 3, 1)


def test_a_kept_connection_that_is_closed_unanswered_is_tried_once_more():
    assert asyncio.run(outcomes(answers_per_connection=1, requests=3)) == ([None] * 3, 3)


def test_a_server_that_never_answers_is_an_error():
    errors, connections = asyncio.run(outcomes(answers_per_connection=0, requests=1))
    assert errors[0] is not None and "RemoteProtocolError" in errors[0]
    assert connections == 1


async def one_outcome(pieces: list[bytes | None], timeout_s: float) -> str | None:
    """The error of a request whose answer comes in these pieces, then the end; None is silence."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            await asyncio.sleep(timeout_s * 0.6)
            if piece is None:
                await reader.read()  # until the client goes
            else:
                writer.write(piece)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, open_http(url, timeout_s, None) as http:
        return (await Client(http, Endpoint(url, "m")).complete("0", [1, 2, 3, 4], 2)).error


HEAD, BODY = answer().split(b"\r\n\r\n", 1)
ENDED_BY_CLOSING = HEAD.partition(b"content-length")[0] + b"\r\n"


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ([HEAD + b"\r\n\r\n", BODY[:30], BODY[30:]], None),
        ([ENDED_BY_CLOSING, BODY], None),
        ([HEAD + b"\r\n\r\n", BODY[:30]], "RemoteProtocolError"),
        ([HEAD + b"\r\n\r\n", BODY[:30], None], "ReadTimeout"),
        ([b"220 mail.example ESMTP\r\n"], "RemoteProtocolError: the answer is not HTTP"),
    ],
    ids=["slow but in time", "ended by closing", "broken off", "falls silent", "another protocol"],
)
def test_ends_of_answers(pieces, error):
    outcome = asyncio.run(one_outcome(pieces, timeout_s=0.2))
    assert outcome == error if error is None else outcome is not None and outcome.startswith(error)

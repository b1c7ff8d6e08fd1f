"""The client must not be what is measured.

Speed is counted per second of processor time, so that a busy machine does not fail the test; the trivial
server runs in the same process and its share is counted too.
"""

import asyncio
import json
import time
from contextlib import suppress

from fourfold.bench.client import Client
from fourfold.bench.endpoint import Endpoint
from fourfold.bench.load import closed_loop
from fourfold.bench.run import open_http

TOKENS, USERS, REQUESTS = 1000, 16, 48
AT_LEAST_TOK_PER_CPU_S = 40_000


def answer() -> bytes:
    """A whole response, each token an event and each event an HTTP chunk, as servers send them."""
    events = []
    for i in range(1, TOKENS + 1):
        finish = "length" if i == TOKENS else None
        event = {"id": "cmpl-0123456789abcdef", "object": "text_completion", "created": 1700000000}
        event |= {"choices": [{"index": 0, "text": " word", "logprobs": None, "finish_reason": finish}]}
        event |= {"usage": {"prompt_tokens": 8, "completion_tokens": i, "total_tokens": 8 + i}}
        events.append(b"data: " + json.dumps(event).encode() + b"\n\n")
    chunks = [b"%x\r\n%s\r\n" % (len(e), e) for e in [*events, b"data: [DONE]\n\n"]]
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    return head + b"".join(chunks) + b"0\r\n\r\n"


async def measure() -> float:
    response = answer()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.partition(b"content-length:")[2].partition(b"\r\n")[0]))
                writer.write(response)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with open_http(url, 30, None) as http:
        client = Client(http, Endpoint(url, "trivial"))
        start = time.process_time()
        records = await closed_loop(client, [[1] * 8] * REQUESTS, TOKENS, USERS, lambda done, total: None)
        seconds = time.process_time() - start
    await asyncio.sleep(0.05)  # lets the server's tasks see that the connections are closed
    server.close()
    assert [r.error for r in records] == [None] * REQUESTS
    return REQUESTS * TOKENS / seconds


def test_the_client_sustains_many_tokens_per_second():
    speed = asyncio.run(measure())
    print(f"client: {speed:,.0f} tok per second of processor time")
    assert speed >= AT_LEAST_TOK_PER_CPU_S

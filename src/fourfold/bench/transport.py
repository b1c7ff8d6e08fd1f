"""HTTP/1.1 under httpx that tells what arrives, and when, from the event of the socket itself.

Client and server often share a machine, where what the client takes is missing in the result. httpx's own
transport wakes a task for every piece of an answer and hands it up through many frames: 75 to 100 us a token
among many users; a parser in C and a function called with each piece take 20. Requests, authentication and
the kinds of errors stay httpx's.
"""

import asyncio
import ssl
import time
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import cast

import httptools
import httpx

try:
    from uvloop import new_event_loop
except ImportError:  # there is none for Windows
    from asyncio import new_event_loop

__all__ = ["OnData", "ToldTransport", "new_event_loop"]

OnData = Callable[[bytes, float], None]
"""Takes a piece of a body, and when it came in seconds of ``time.perf_counter``."""

LENGTHS = {b"content-length", b"transfer-encoding"}


class ToldTransport(httpx.AsyncBaseTransport):
    """Connections as many as there are requests at a time, kept while servers keep them.

    A request's extension ``on_data`` is an OnData for the body of its answer if that has status 200; the
    response is then empty.
    """

    def __init__(self) -> None:
        self.idle: dict[tuple[str, str, int | None], list[Connection]] = defaultdict(list)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """The answer. Raises httpx.HTTPError.

        Servers close kept connections, and llama.cpp's does so just as they are used: a request that met
        this is sent once more, and the time it lost counts.
        """
        url = request.url
        idle = self.idle[url.scheme, url.host, url.port]
        while idle:
            kept = idle.pop()
            if kept.transport.is_closing():
                continue
            try:
                return await self.ask(kept, request, idle)
            except httpx.RemoteProtocolError:
                if kept.headers:
                    raise
        return await self.ask(await connect(request), request, idle)

    async def ask(
        self, connection: "Connection", request: httpx.Request, idle: list["Connection"]
    ) -> httpx.Response:
        """The answer over ``connection``, which is kept in ``idle`` if it can be."""
        try:
            response = await connection.ask(request)
        except BaseException:
            connection.transport.abort()
            raise
        if connection.stays:
            idle.append(connection)
        else:
            connection.transport.close()
        return response

    async def aclose(self) -> None:
        """Close the kept connections."""
        for connection in (one for kept in self.idle.values() for one in kept):
            connection.transport.close()


class Connection(asyncio.Protocol):
    """A connection to a server, for one request after the other."""

    transport: asyncio.Transport
    answer: asyncio.Future[httpx.Response] | None = None
    stays = False  # open after the last answer

    async def ask(self, request: httpx.Request) -> httpx.Response:
        """Send, and wait as long as pieces come in time. Raises ReadTimeout, RemoteProtocolError."""
        self.parser = httptools.HttpResponseParser(self)
        self.headers: list[tuple[bytes, bytes]] = []
        self.body: list[bytes] = []
        self.on_data: OnData = request.extensions.get("on_data", self.keep)
        self.heard_s = time.perf_counter()
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(wire_format(request))
        timeout_s = left_s = request.extensions["timeout"]["read"]
        while left_s is None or left_s > 0:
            await asyncio.wait((self.answer,), timeout=left_s)
            if self.answer.done():
                return self.answer.result()
            left_s = self.heard_s + timeout_s - time.perf_counter()
        raise httpx.ReadTimeout("", request=request)

    def keep(self, data: bytes, at_s: float) -> None:
        """Hold a piece of the body for the response."""
        self.body.append(data)

    def fail(self, why: str) -> None:
        """End the answer that is waited for, if there is one."""
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(httpx.RemoteProtocolError(why))

    # What follows is called by the event loop and by the parser.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Bytes came now."""
        self.heard_s = time.perf_counter()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.fail(f"the answer is not HTTP: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed, which is the end of an answer that has no length."""
        if self.answer is not None and self.headers and not {n.lower() for n, _ in self.headers} & LENGTHS:
            self.on_message_complete()
        self.fail("Server disconnected without sending a complete response.")

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header."""
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The body of a refusal is short and asked for as a whole."""
        if self.parser.get_status_code() != 200:
            self.on_data = self.keep

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        self.on_data(data, self.heard_s)

    def on_message_complete(self) -> None:
        """The end."""
        if self.answer is not None and not self.answer.done():
            self.stays = self.parser.should_keep_alive()  # the parser knows it now and not later
            status, body = self.parser.get_status_code(), b"".join(self.body)
            self.answer.set_result(httpx.Response(status, headers=self.headers, content=body))


async def connect(request: httpx.Request) -> Connection:
    """A new connection to the server that ``request`` is for. Raises ConnectTimeout, ConnectError."""
    url, secure = request.url, request.url.scheme == "https"
    port = url.port or (443 if secure else 80)
    try:
        async with asyncio.timeout(request.extensions["timeout"]["connect"]):
            opening = asyncio.get_running_loop().create_connection(
                Connection, url.host, port, ssl=ssl_context() if secure else None
            )
            return (await opening)[1]
    except TimeoutError as error:
        raise httpx.ConnectTimeout("", request=request) from error
    except OSError as error:
        raise httpx.ConnectError(str(error), request=request) from error


@cache
def ssl_context() -> ssl.SSLContext:
    """httpx's; making one takes long."""
    return httpx.create_ssl_context(trust_env=False)


def wire_format(request: httpx.Request) -> bytes:
    """``request``, whose body is at hand, in the bytes of HTTP/1.1."""
    lines = [b"%b %b HTTP/1.1" % (request.method.encode(), request.url.raw_path)]
    lines += [b"%b: %b" % header for header in request.headers.raw]
    return b"\r\n".join([*lines, b"", request.content])

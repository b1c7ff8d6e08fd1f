"""Server-sent events, and noticing that the client is gone.

Starlette's StreamingResponse learns of a disconnect only when it next writes, or through a task group per
response; here one watcher task per request serves whole and streamed answers alike, and what is being
computed is cancelled at once, so that an abandoned request stops costing engine steps.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


class ClientGoneError(Exception):
    """The client closed the connection before its answer was complete."""


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: %b\n\n" % to_json(data)


async def until_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """The result of ``work``; when the client disconnects first, ``work`` is cancelled.

    Raises ClientGoneError then.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))


async def disconnected(receive: Receive) -> None:
    """Return when the client is gone. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A ``text/event-stream`` response. ``first`` is already there, so that earlier failures had a status."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None]):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.first, self.events = first, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write until the end, or until the client is gone."""
        try:
            await until_disconnect(receive, self.write(send))
        except ClientGoneError:
            pass
        finally:
            await self.events.aclose()

    async def write(self, send: Send) -> None:
        """Send everything; one ASGI message, and so one write, for what has arrived together."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send(body_of(self.first))
        async for events in self.events:
            await send(body_of(events))


def body_of(events: bytes) -> Message:
    """A part of the response, which ends with ``DONE``."""
    return {"type": "http.response.body", "body": events, "more_body": not events.endswith(DONE)}

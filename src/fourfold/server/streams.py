"""The way of tokens from the engine's thread to one HTTP request waiting in asyncio."""

import asyncio
from collections.abc import Callable, Collection, Sequence
from typing import Self

from fourfold.engine import Request, TokenOutput
from fourfold.server.errors import ApiError


class TokenStream:
    """The tokens of one HTTP request, which may be several engine requests (choices).

    Iterating yields what has arrived since, as lists of (choice index, TokenOutput); it ends when every
    choice is finished and raises ApiError when the engine refused or failed. Always ``close()`` it: that
    aborts what is unfinished. It belongs to the event loop that made it; only ``event_loop`` is for others.
    """

    def __init__(self, requests: Sequence[Request], abort: Callable[[Collection[str]], None]):
        self.requests = requests
        self.event_loop = asyncio.get_running_loop()
        self._abort = abort
        self._index = {request.request_id: i for i, request in enumerate(requests)}
        self._unfinished = set(self._index)
        self._arrived: list[tuple[int, TokenOutput]] = []
        self._error: ApiError | None = None
        self._waiting: asyncio.Future[None] | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[tuple[int, TokenOutput]]:
        while not self._arrived:
            if self._error is not None:
                raise self._error
            if not self._unfinished:
                raise StopAsyncIteration
            self._waiting = self.event_loop.create_future()
            await self._waiting
        batch, self._arrived = self._arrived, []
        return batch

    @property
    def finished(self) -> bool:
        """Whether every choice's last token has been handed out."""
        return not (self._unfinished or self._arrived)

    def push(self, output: TokenOutput | ApiError) -> None:
        """Take one token, or the error that ends the stream. Called in the event loop."""
        if isinstance(output, ApiError):
            self._error = output
        else:
            self._arrived.append((self._index[output.request_id], output))
            if output.finish_reason is not None:
                self._unfinished.discard(output.request_id)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def close(self) -> None:
        """Abort what is unfinished; safe to call again."""
        if self._unfinished and self._error is None:
            self._abort(self._unfinished)
        self._unfinished = set()

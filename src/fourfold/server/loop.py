"""The engine's own thread.

The engine is plain synchronous code and is touched by one thread only. Requests and aborts cross to it
through a thread-safe queue; the tokens of one step cross back in one ``call_soon_threadsafe``, so that a step
that serves many requests wakes the event loop once. The price: the thread shares the interpreter lock with
the HTTP side, so everything done per token there is kept small.
"""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol, TypeVar

from fourfold.core.errors import FourfoldError
from fourfold.engine import Request, TokenOutput
from fourfold.server.errors import ApiError
from fourfold.server.streams import TokenStream

logger = logging.getLogger("fourfold.server")

T = TypeVar("T")
Delivery = list[tuple[TokenStream, TokenOutput | ApiError]]
RETURN_S = 0.004  # from one client's next request to another's, when both were answered shortly before


class SteppingEngine(Protocol):
    """The part of an Engine that the loop drives."""

    def add(self, request: Request) -> None:
        """Take a request. Raises FourfoldError when it can never be served."""
        ...

    def abort(self, request_id: str) -> Any:
        """Forget a request."""
        ...

    def step(self) -> list[TokenOutput]:
        """Advance. Returns new tokens, those of one request in order."""
        ...


class Call:
    """A function for the engine's thread, and the future of the event loop that waits for it."""

    def __init__(self, function: Callable[[], Any], future: asyncio.Future[Any]):
        self.function, self.future = function, future

    def run(self) -> None:
        """Call it, and hand over what it returns or raises."""
        try:
            settle, value = self.future.set_result, self.function()
        except Exception as error:
            settle, value = self.future.set_exception, _why_refused(error)
        with contextlib.suppress(RuntimeError):  # that event loop is closed: nobody waits any more
            self.future.get_loop().call_soon_threadsafe(self._settle, settle, value)

    def _settle(self, settle: Callable[[Any], None], value: Any) -> None:
        if not self.future.done():
            settle(value)


class EngineLoop:
    """Steps an engine in a background thread, from the first request until ``stop``."""

    def __init__(self, engine: SteppingEngine):
        self.engine = engine
        self.failure: str | None = None
        self._inbox: queue.SimpleQueue[TokenStream | Call | list[str] | None] = queue.SimpleQueue()
        self._streams: dict[str, TokenStream] = {}
        self._lock = threading.Lock()
        self._closed = self._stopping = False
        self._deadline = 0.0
        self._gone = 0  # clients that were answered, and may be back soon
        self._thread: threading.Thread | None = None

    def refusal(self) -> ApiError | None:
        """Why a new request would be refused now, or None when it would be taken."""
        if self.failure is not None:
            return ApiError(503, self.failure, code="engine_failed")
        return _shutting_down() if self._closed else None

    def drain(self) -> None:
        """Take no new requests; those that run may finish."""
        self._closed = True

    def stop(self, grace_s: float = 0.0) -> None:
        """Take no new requests, let those that run finish for ``grace_s`` seconds, end the thread."""
        with self._lock:
            self._closed = True
            self._deadline = time.monotonic() + grace_s
            self._inbox.put(None)
        if self._thread is not None:
            self._thread.join()

    def submit(self, requests: Sequence[Request]) -> TokenStream:
        """Queue the requests and return their stream. Raises ApiError 503 when closed or failed."""
        with self._lock:
            if (refusal := self.refusal()) is not None:
                raise refusal
            stream = TokenStream(requests, self._queue_abort)
            self._inbox.put(stream)
            self._start()
        return stream

    async def call(self, function: Callable[[], T]) -> T:
        """Run ``function`` in the engine's thread between two steps, which it holds up. Raises ApiError."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        with self._lock:
            if (refusal := self.refusal()) is not None:
                raise refusal
            self._inbox.put(Call(function, future))
            self._start()
        return await future

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="fourfold-engine", daemon=True)
            self._thread.start()

    def _queue_abort(self, request_ids: Collection[str]) -> None:
        self._inbox.put(list(request_ids))

    # Everything below runs in the engine's thread.

    def _run(self) -> None:
        while not self._stopping or (self._streams and time.monotonic() < self._deadline):
            self._obey(wait=not self._streams)
            if self._streams:
                self._step()
        self._end_all(_shutting_down())

    def _obey(self, wait: bool) -> None:
        """Carry out all queued commands; ``wait`` for the first when there is nothing else to do.

        Clients that were answered together ask again one shortly after the other. Then a step for the first
        alone would hold up the others for longer than waiting for them takes.
        """
        patience_s = None if wait else 0.0
        while True:
            try:
                command = self._inbox.get(patience_s != 0.0, patience_s)
            except queue.Empty:
                self._gone = 0 if patience_s else self._gone
                return
            if command is None:
                self._stopping = True
            elif isinstance(command, TokenStream):
                self._add(command)
            elif isinstance(command, Call):
                command.run()
            else:
                for request_id in command:
                    self._abort(request_id)
            patience_s = RETURN_S if wait and self._streams and self._gone else 0.0

    def _add(self, stream: TokenStream) -> None:
        """Hand a stream's requests to the engine; if it refuses one, the stream ends with that refusal."""
        for request in stream.requests:
            try:
                if self.failure is not None:
                    raise ApiError(503, self.failure, code="engine_failed")
                self.engine.add(request)
            except Exception as error:
                for earlier in stream.requests:
                    self._abort(earlier.request_id)
                self._push([(stream, _why_refused(error))])
                return
            self._streams[request.request_id] = stream
            self._gone = max(self._gone - 1, 0)

    def _abort(self, request_id: str) -> None:
        """Forget a request; one that is finished or was never added is ignored."""
        if self._streams.pop(request_id, None) is not None and self.failure is None:
            self.engine.abort(request_id)

    def _step(self) -> None:
        try:
            outputs = self.engine.step()
        except Exception as error:
            self._fail(error)
            return
        delivery: Delivery = []
        self._gone += sum(output.finish_reason is not None for output in outputs)
        for output in outputs:
            if (stream := self._streams.get(output.request_id)) is not None:
                delivery.append((stream, output))
                if output.finish_reason is not None:
                    del self._streams[output.request_id]
        self._push(delivery)

    def _push(self, delivery: Delivery) -> None:
        by_loop = defaultdict(list)
        for stream, output in delivery:
            by_loop[stream.event_loop].append((stream, output))
        for event_loop, items in by_loop.items():
            try:
                event_loop.call_soon_threadsafe(_deliver, items)
            except RuntimeError:  # that event loop is closed: nobody waits any more
                for stream, _ in items:
                    for request in stream.requests:
                        self._abort(request.request_id)

    def _fail(self, error: Exception) -> None:
        """The engine's state is unknown after a failed step: it is not stepped again."""
        logger.error("The engine failed; the server answers 503 from now on.", exc_info=error)
        reason = str(error) if isinstance(error, FourfoldError) else type(error).__name__
        with self._lock:
            self.failure = f"The engine failed ({reason}): see the server's log and restart it."
        self._end_all(ApiError(500, self.failure, code="engine_failed"))

    def _end_all(self, error: ApiError) -> None:
        streams = {id(stream): stream for stream in self._streams.values()}
        for request_id in list(self._streams):
            self._abort(request_id)
        self._push([(stream, error) for stream in streams.values()])


def _deliver(items: Delivery) -> None:
    for stream, output in items:
        stream.push(output)


def _shutting_down() -> ApiError:
    return ApiError(503, "The server is shutting down.", code="shutting_down")


def _why_refused(error: Exception) -> ApiError:
    """What the client hears when the engine would not take its request."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, FourfoldError):
        return ApiError(400, str(error))
    logger.error("The engine could not take a request.", exc_info=error)
    return ApiError(500, "The server failed on this request; its log says why.")

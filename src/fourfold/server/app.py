"""The FastAPI application: OpenAI's endpoints over one engine.

``/v1/models``, ``/v1/completions``, ``/v1/chat/completions``, ``/health``, ``/metrics``. Entries of
``/v1/models`` carry three fields more than OpenAI's: ``max_model_len`` (tokens, as vLLM), ``vocab_size``
(every token id below it may stand in a prompt) and ``fourfold``, the model's card.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fourfold.engine import Engine
from fourfold.server.errors import install_handlers
from fourfold.server.generation import Generation
from fourfold.server.loop import EngineLoop
from fourfold.server.metrics import ServerMetrics
from fourfold.server.schemas import ChatRequest, CompletionRequest, GenerationRequest, StreamOptions
from fourfold.server.service import Service
from fourfold.server.sse import ClientGoneError, EventStream, until_disconnect

Body = TypeVar("Body", bound=GenerationRequest)

COUNTED = ("/v1/completions", "/v1/chat/completions")
CLIENT_CLOSED_REQUEST = 499  # nginx's status for an answer nobody waits for; only the metrics see it


def create_app(engine: Engine, loop: EngineLoop | None = None) -> FastAPI:
    """The application that serves ``engine``, stepped in ``loop`` (a fresh one by default), which it ends."""
    loop = loop or EngineLoop(engine)
    service = Service(engine, loop)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(loop.stop)

    app = FastAPI(title="Fourfold", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    install_handlers(app)
    app.add_middleware(CountRequests, metrics=service.metrics)
    add_generation_routes(app, service)  # first, since routes are tried in turn
    add_status_routes(app, service)
    return app


def add_status_routes(app: FastAPI, service: Service) -> None:
    """What the server is and how it is doing."""
    created = int(time.time())

    def model_entry() -> dict[str, Any]:
        return {
            "id": service.name,
            "object": "model",
            "created": created,
            "owned_by": "fourfold",
            "max_model_len": service.engine.max_request_tokens,
            "vocab_size": service.engine.model.shape.vocabulary,
            "fourfold": service.engine.card.model_dump(mode="json"),
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [model_entry()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """The served model by name."""
        service.check_name(name)
        return model_entry()

    @app.get("/health")
    async def health() -> Response:
        """200 while requests are taken, else 503 with the reason."""
        if (refusal := service.loop.refusal()) is not None:
            return JSONResponse({"status": refusal.code, "reason": refusal.message}, status_code=503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus text."""
        return PlainTextResponse(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)


def add_generation_routes(app: FastAPI, service: Service) -> None:
    """The endpoints that write tokens."""

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue a text or token ids."""
        return await answer(request, body, service.begin_completion)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Write the next turn of a conversation."""
        return await answer(request, body, service.begin_chat)


async def answer(
    request: Request, body: Body, begin: Callable[[Body], Coroutine[Any, Any, Generation]]
) -> Response:
    """Whole or streamed; a stream's status waits for its first token, so that errors have their own."""
    generation = await begin(body)
    try:
        if not body.stream:
            return JSONResponse(await until_disconnect(request.receive, generation.whole()))
        events = generation.events(body.stream_options or StreamOptions())
        first = await until_disconnect(request.receive, anext(events))
        return EventStream(first, events)
    except BaseException as error:
        generation.stream.close()
        if isinstance(error, ClientGoneError):
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        raise


class CountRequests:
    """Counts the answers of the generating endpoints by status."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, remembering the status."""
        if scope["type"] != "http" or scope["path"] not in COUNTED:
            return await self.app(scope, receive, send)
        status = 500

        async def counting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, counting_send)
        finally:
            self.metrics.requests.labels(scope["path"], str(status)).inc()

"""``serve``: a model, a port, uvicorn, and an end without noise.

The port is taken before the model is loaded, so that a port in use is told at once and not after a minute of
loading; it begins to listen when the model is ready, so that a client that can connect is served.
"""

import contextlib
import gc
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

import uvicorn

from fourfold.core.errors import FourfoldError, UsageError
from fourfold.engine import Engine, EngineConfig
from fourfold.server.app import create_app
from fourfold.server.loop import EngineLoop

GRACE_S = 10  # what running answers get to finish after SIGINT or SIGTERM
KEEP_ALIVE_S = 75  # longer than clients pause between requests, or they meet a closing connection


class Server(uvicorn.Server):
    """Uvicorn that tells its URL once, refuses new work while it ends, and ends with exit code 0."""

    def __init__(self, config: uvicorn.Config, loop: EngineLoop, announcement: str):
        super().__init__(config)
        self.engine_loop, self.announcement = loop, announcement

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets=sockets)
        if self.started:
            print(self.announcement, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets running answers finish; a second SIGINT does not wait for them."""
        self.engine_loop.drain()
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, without raising the signal once more at the end: being told to stop is no failure."""
        with super().capture_signals():
            try:
                yield
            finally:
                self._captured_signals.clear()


def serve(
    source: str | Path, host: str = "127.0.0.1", port: int = 8000, config: EngineConfig | None = None
) -> None:
    """Load ``source`` and serve it until SIGINT or SIGTERM; ``port`` 0 lets the system choose one.

    Raises FourfoldError when the port is in use or the model cannot be loaded, UsageError for a bad address.
    """
    with take_port(host, port) as listener:
        # libgomp lets threads wait briefly only while all teams fit the cores: a team that loading leaves to
        # the main thread would make every step of the engine's thread a third slower, so loading has its own
        with ThreadPoolExecutor(1, "fourfold-load") as loader:
            engine = loader.submit(Engine.load, source, config or EngineConfig()).result()
        print(f"Computed: {engine.computed}", file=sys.stderr)
        gc.freeze()  # what is loaded stays: looking through all of it again would hold up every answer
        run(engine, listener, host)


def run(engine: Engine, listener: socket.socket, host: str) -> None:
    """Serve ``engine`` on a bound socket until told to stop."""
    loop = EngineLoop(engine)
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{listener.getsockname()[1]}"
    announcement = f"Fourfold serves {engine.card.name} ({engine.card.weight_format}) at {url}"
    settings = uvicorn.Config(
        create_app(engine, loop),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_S,
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    server = Server(settings, loop, announcement)
    try:
        server.run(sockets=[listener])
    except OSError as error:
        if server.started:
            raise
        # another process began to listen here while the model was loading
        raise FourfoldError(f"Cannot listen at {url}: {error.strerror}. Choose another --port.") from error
    finally:
        loop.stop()


def take_port(host: str, port: int) -> socket.socket:
    """A TCP socket bound to ``host`` and ``port``, not listening yet. Raises FourfoldError, UsageError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"'{host}' is no address of this machine: {error}. Try --host 127.0.0.1.") from error
    listener = socket.socket(family, kind, protocol)
    if sys.platform != "win32":
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except (OSError, OverflowError) as error:
        listener.close()
        raise FourfoldError(
            f"Cannot take port {port} on {host}: {error}. Stop what uses it, or choose another with --port "
            "(0 takes any free one)."
        ) from error
    return listener

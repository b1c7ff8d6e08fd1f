"""A real engine behind a real uvicorn on a loopback port, in a thread of the test process."""

import threading
from collections.abc import Callable, Iterator

import pytest
import uvicorn
from server_harness import LiveServer, eventually

from fourfold.engine import Engine, EngineConfig
from fourfold.server.app import create_app
from fourfold.server.launch import Server, take_port
from fourfold.server.loop import EngineLoop


@pytest.fixture(scope="session")
def start_server(tiny_llama) -> Iterator[Callable[..., LiveServer]]:
    """Starts servers over the tiny llama; all of them end with the session."""
    running: list[tuple[Server, threading.Thread]] = []

    def start(**config) -> LiveServer:
        engine = Engine.load(tiny_llama, EngineConfig(threads=1, **config))
        loop = EngineLoop(engine)
        listener = take_port("127.0.0.1", 0)
        settings = uvicorn.Config(create_app(engine, loop), log_level="critical", timeout_graceful_shutdown=2)
        server = Server(settings, loop, "ready")
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        running.append((server, thread))
        assert eventually(lambda: server.started)
        return LiveServer(engine, loop, f"http://127.0.0.1:{listener.getsockname()[1]}", server)

    yield start
    for server, _ in running:
        server.should_exit = True
    for _, thread in running:
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def live(start_server) -> LiveServer:
    """One server for all tests that leave it as they found it."""
    return start_server()

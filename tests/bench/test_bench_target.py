"""Targets: URLs, and models served for the length of a measurement."""

import subprocess
import sys
import tempfile
from contextlib import ExitStack

import pytest

from fourfold.bench.target import (
    base_url,
    free_port,
    is_url,
    public_target,
    serving,
    stop,
    wait_until_healthy,
)
from fourfold.core.errors import FourfoldError, UsageError

HEALTHY = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_urls(tmp_path, monkeypatch):
    assert (
        is_url("http://h:1/v1") and is_url("https://h") and not is_url("org/model") and not is_url("./folder")
    )
    with pytest.raises(UsageError, match="write it as http://localhost:8000"):
        is_url("localhost:8000")
    assert {base_url(u) for u in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/")} == {
        "http://h:1"
    }


def test_what_is_written_down_holds_no_secret_and_no_home(tmp_path):
    (tmp_path / "my-model").mkdir()
    assert public_target("https://me:secret@host:8/v1?key=1") == "https://host:8/v1"
    assert public_target(str(tmp_path / "my-model")) == "my-model"
    assert public_target("org/model") == "org/model"


@pytest.fixture
def start():
    """Starts a program and hands out its process and its log; both are gone after the test."""
    with ExitStack() as stack:

        def begin(code: str, *args: str):
            log = stack.enter_context(tempfile.TemporaryFile())
            process = subprocess.Popen([sys.executable, "-c", code, *args], stdout=log, stderr=log)
            stack.callback(stop, process)
            return process, log

        yield begin


def test_waiting_for_health_and_stopping(start):
    port = free_port()
    process, log = start(HEALTHY, str(port))
    wait_until_healthy(process, f"http://127.0.0.1:{port}", "m", log, timeout_s=20)
    stop(process)
    assert process.returncode is not None


def test_a_server_that_dies_says_why(start):
    process, log = start("import sys; sys.exit('the config is broken')")
    words = r"ended with code 1 before it was ready\. It said: the config is broken"
    with pytest.raises(FourfoldError, match=words):
        wait_until_healthy(process, "http://127.0.0.1:9", "m", log, timeout_s=20)


def test_a_server_that_is_never_ready(start):
    process, log = start("import time; print('loading', flush=True); time.sleep(60)")
    with pytest.raises(FourfoldError, match=r"was not ready after 2 s\. It said: loading"):
        wait_until_healthy(process, "http://127.0.0.1:9", "m", log, timeout_s=2)


def test_a_model_that_does_not_exist_is_one_error(tmp_path):
    with (
        pytest.raises(FourfoldError, match=r"The server for '.*nothing' ended"),
        serving(str(tmp_path / "nothing")),
    ):
        pytest.fail("nothing is served")

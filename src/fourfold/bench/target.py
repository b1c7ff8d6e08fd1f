"""What is measured: a server that runs already, or a model that is served for the length of the
measurement.

A model is served by ``python -m fourfold serve`` in a process of its own, so that it is measured through
the same HTTP as any other server.
"""

import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit, urlunsplit

import httpx

from fourfold.core.errors import FourfoldError, UsageError

LOAD_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 15.0


def is_url(target: str) -> bool:
    """Whether ``target`` is a server. Raises UsageError for host:port without a scheme, which is no model."""
    if re.fullmatch(r"[\w.-]+:\d+(/.*)?", target) and not Path(target).exists():
        raise UsageError(f"'{target}' looks like a server's address; write it as http://{target}.")
    return target.startswith(("http://", "https://"))


def base_url(url: str) -> str:
    """``url`` without a trailing ``/v1`` or slash."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def public_target(target: str) -> str:
    """``target`` as it may be written down: a URL without user and password, a path without its parents."""
    if not target.startswith(("http://", "https://")):
        path = Path(target)
        return path.resolve().name if path.exists() else target
    parts = urlsplit(target)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


@contextmanager
def serving(target: str, options: Sequence[str] = ()) -> Iterator[str]:
    """The base URL of ``target``; a model is served while the block runs and stopped after it, however it
    ends. ``options`` are further words for ``fourfold serve``.

    Raises FourfoldError, with the last lines of the server's stderr, when it dies or never becomes healthy.
    """
    if is_url(target):
        yield base_url(target)
        return
    port = free_port()
    command = [sys.executable, "-m", "fourfold", "serve", target, "--host", "127.0.0.1", "--port", str(port)]
    command += options
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            wait_until_healthy(process, f"http://127.0.0.1:{port}", target, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            stop(process)


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_healthy(
    process: subprocess.Popen[bytes], url: str, target: str, log: IO[bytes], timeout_s: float = LOAD_TIMEOUT_S
) -> None:
    """Return once `/health` answers 200. Raises FourfoldError when the process ends or time runs out."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if process.poll() is not None:
            raise FourfoldError(
                f"The server for '{target}' ended with code {process.returncode} before it was ready. "
                f"It said: {last_words(log)}"
            )
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise FourfoldError(
        f"The server for '{target}' was not ready after {timeout_s:.0f} s. It said: {last_words(log)}"
    )


def last_words(log: IO[bytes], length: int = 1500) -> str:
    """The end of a log, for a person."""
    log.seek(0, 2)
    log.seek(max(0, log.tell() - length))
    return log.read().decode(errors="replace").strip() or "(nothing)"


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, and end it when it does not."""
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

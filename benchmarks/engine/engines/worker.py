"""What every engine's process shares: commands in, one JSON line each; answers out, one JSON line each.

Runs in the engine's own Python, so it needs nothing but the standard library. An engine is an object with

    add(key, prompt, count)   queue a prompt (token ids) to be continued greedily by exactly ``count`` tokens
    step()                    [(key, token), ...]: what one forward pass gave
    busy                      whether anything is unfinished

and everything that is timed is made of these three, so that all engines are timed by the same lines. An
engine's library may print what it likes: answers go over a copy of stdout, and stdout itself into the log.
"""

import ctypes
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

Prompts = list[list[int]]


class Engine(Protocol):
    """See above."""

    @property
    def busy(self) -> bool:
        """Whether anything is unfinished."""
        ...

    def add(self, key: int, prompt: list[int], count: int) -> None:
        """Queue a prompt."""
        ...

    def step(self) -> list[tuple[int, int]]:
        """One forward pass."""
        ...


def memory_bytes(field: str) -> int:
    """``VmHWM`` (the peak) or ``VmRSS`` (now) of this process, from the kernel's account."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def generate(engine: Engine, prompts: Prompts, count: int) -> dict[str, Any]:
    """All prompts at once. Seconds until every one has its first token, from then to the end, and the tokens.

    ``later_tokens`` came after the moment at which the last prompt had got its first.
    """
    tokens: list[list[int]] = [[] for _ in prompts]
    begin = time.perf_counter()
    for key, prompt in enumerate(prompts):
        engine.add(key, prompt, count)
    while not all(tokens):
        take(engine, tokens)
    first, early = time.perf_counter(), sum(map(len, tokens))
    while engine.busy:
        take(engine, tokens)
    end = time.perf_counter()
    return {
        "first_s": first - begin,
        "later_s": end - first,
        "later_tokens": sum(map(len, tokens)) - early,
        "tokens": tokens,
    }


def take(engine: Engine, tokens: list[list[int]]) -> None:
    """One step's tokens to their sequences."""
    for key, token in engine.step():
        tokens[key].append(token)


def closed_loop(engine: Engine, prompts: Prompts, count: int, users: int) -> dict[str, Any]:
    """Every user has one request in flight until all prompts are done, as over HTTP but without it."""
    waiting = deque(enumerate(prompts))
    left, produced = {}, 0
    begin = time.perf_counter()
    while waiting or engine.busy:
        while waiting and len(left) < users:
            key, prompt = waiting.popleft()
            engine.add(key, prompt, count)
            left[key] = count
        for key, _ in engine.step():
            produced += 1
            left[key] -= 1
            if not left[key]:
                del left[key]
    return {"seconds": time.perf_counter() - begin, "produced": produced}


def packages(*names: str) -> dict[str, str]:
    """Versions of installed packages."""
    return {name: version(name) for name in names}


def end_with_parent() -> None:
    """Ask the kernel to end this process when the one that started it ends: a stopped one reads no stdin."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG


def serve(load: Callable[..., Engine], *reported: str) -> None:
    """Answer commands until stdin ends. ``load(**options)`` makes the engine; ``reported`` are packages."""
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    engine: Any = None
    for line in sys.stdin:
        command = json.loads(line)
        kind = command.pop("do")
        if kind == "load":
            imported = memory_bytes("VmRSS")
            begin = time.perf_counter()
            engine = load(**command)
            seconds = time.perf_counter() - begin
            answer: Any = {"seconds": seconds, "before_bytes": imported, "versions": packages(*reported)}
        elif kind == "generate":
            answer = generate(engine, **command)
        elif kind == "closed_loop":
            answer = closed_loop(engine, **command)
        elif kind == "memory":
            answer = {"peak_bytes": memory_bytes("VmHWM"), "now_bytes": memory_bytes("VmRSS")}
        else:
            answer = getattr(engine, kind)(**command)
        answers.write(json.dumps(answer) + "\n")

"""The outside of the sandbox: start the guard, wait no longer than allowed, read what it reported.

A program gets: a process group of its own, killed whole at the end; ``python -I -S`` (no site packages, no
variables of the caller's), an empty environment and folder, nothing on stdin; limits on CPU seconds, address
space, file sizes, open files and processes. On Linux, where the kernel lets it, also: user nobody when
started by root, no network (and no sockets: those with a path are not the network's), no other process in
sight, every file outside its folder read-only, a system call filter against new processes and memory that no
limit counts. Which of these were had is in the verdict: not every machine grants them.

Price: some 50 ms a program. What it is not: proof against a hole in the kernel. What the user may read (what
everybody may, when root starts it) can be read inside.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import IO

from pydantic import Field, ValidationError

from fourfold.core.errors import FourfoldError
from fourfold.core.records import Record

GUARD = Path(__file__).with_name("guard.py")
LONGEST_REPORT = 64 << 10
TIMED_OUT = "timed out"
STARTING_S = 60.0
WALLS = (
    "no network",
    "no other processes in sight",
    "files read-only outside its own folder",
    "no new processes",
)
"""What the guard can have of a kernel that grants it; "user nobody" comes to these when root starts it."""


class Limits(Record):
    """What one program may use."""

    wall_s: float = Field(default=10.0, gt=0)
    memory_bytes: int = Field(default=1 << 30, ge=64 << 20, description="of address space")
    disk_bytes: int = Field(default=16 << 20, ge=1 << 20, description="of each file, and of its folder")
    open_files: int = Field(default=64, ge=16)


DEFAULT_LIMITS = Limits()


class Verdict(Record):
    """How a program ended. ``passed`` only if its last line was reached, whatever its exit code."""

    passed: bool
    reason: str = Field(description="'passed', 'timed out', an exception's name and text, or how it died")
    isolation: list[str] = Field(description="the walls that were had; empty when the guard never started")


class ReportLine(Record):
    """What the guard writes; whatever else a program may have written there is none."""

    isolation: list[str] = []
    token: str | None = None
    error: str | None = None


def run_program(program: str, limits: Limits = DEFAULT_LIMITS) -> Verdict:
    """Run Python source text to its end or to its limits.

    Where the machine is so busy that the guard itself did not start in that time, it is run again with more.
    """
    verdict = _run_once(program, limits, limits.wall_s)
    if not verdict.passed and verdict.reason == TIMED_OUT and not verdict.isolation:
        verdict = _run_once(program, limits, limits.wall_s + STARTING_S)
    return verdict


def _run_once(program: str, limits: Limits, wall_s: float) -> Verdict:
    token = secrets.token_hex(16)
    cpu_s = ceil(limits.wall_s) + 1
    job = {"program": program, "token": token, "limits": limits.model_dump() | {"cpu_s": cpu_s}}
    with (
        tempfile.TemporaryDirectory(prefix="fourfold-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile("w+") as job_file,
        tempfile.TemporaryFile() as report,
    ):
        json.dump(job, job_file)
        job_file.flush()
        job_file.seek(0)
        code = _run(job_file, report, folder, wall_s)
        report.seek(0)
        return _verdict(report.read(LONGEST_REPORT), token, code)


def _run(job: IO[str], report: IO[bytes], folder: str, wall_s: float) -> int | None:
    """The guard's exit code, or None when it had to be stopped."""
    files = (job.fileno(), report.fileno())
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", str(GUARD), *map(str, files)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={},
        pass_fds=files,
        start_new_session=True,
    )
    try:
        return process.wait(wall_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()


def _verdict(report: bytes, token: str, code: int | None) -> Verdict:
    """What the report says; only a line with the token is a pass, and only if it came in time."""
    isolation, reason = [], TIMED_OUT if code is None else f"ended before its last line (code {code})"
    passed = False
    for line in report.splitlines():
        try:
            said = ReportLine.model_validate_json(line)
        except ValidationError:
            continue  # the program may write here too; it does not know the token
        isolation = isolation or said.isolation
        passed = passed or (said.token == token and code is not None)
        reason = said.error[:300] if said.error and code is not None else reason
    return Verdict(passed=passed, reason="passed" if passed else reason, isolation=isolation)


def describe(isolation: list[str]) -> str:
    """One sentence on the walls that were had, and on those that were not."""
    said = f"Sandbox: {', '.join(isolation)}."
    missing = [wall for wall in WALLS if wall not in isolation]
    return said + (f" Not granted on this machine: {', '.join(missing)}." if missing else "")


@lru_cache(maxsize=1)
def probe() -> Verdict:
    """Run one line, to learn what this machine grants. Raises FourfoldError when nothing can run at all."""
    verdict = run_program("import math, typing, collections, re", Limits(wall_s=60.0))
    if not verdict.passed:
        raise FourfoldError(
            f"Programs cannot be run in the sandbox here: an empty one ended with '{verdict.reason}'. "
            f"It is started as {sys.executable} -I -S; see that this Python runs by itself."
        )
    return verdict

"""What a program may do, and that no way of ending early passes for having passed."""

import contextlib
import os
import secrets
import socket
import sys
import time
from pathlib import Path

import pytest

from fourfold.core.errors import FourfoldError
from fourfold.evaluate.sandbox import WALLS, Limits, Verdict, describe, probe, run_program, sandbox

FAST = Limits(wall_s=20.0)  # generous: other tests may hold the cores


def needs(word: str):
    """Only where this machine's kernel grants the wall that has ``word`` in its name."""
    [wall] = [wall for wall in WALLS if word in wall]
    if wall not in probe().isolation:
        pytest.skip(f"this kernel does not grant: {wall}")


def ended(program: str, limits: Limits = FAST) -> Verdict:
    return run_program(program, limits)


def test_a_program_that_reaches_its_end_passes():
    verdict = ended("import math\nassert math.sqrt(9) == 3\n")
    assert verdict.passed and verdict.reason == "passed"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 + 1 == 3, 'sums'", "AssertionError: sums"),
        ("def f(:", "SyntaxError"),
        ("import sys\nsys.exit(0)", "SystemExit: 0"),
        ("exit()", "NameError"),  # site is not there
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import os\nos._exit(0)", "ended before its last line (code 0)"),
        ("import ctypes\nctypes.string_at(0)", "ended before its last line"),
        ("def f(): f()\nf()", "RecursionError"),
        ("input()", "EOFError"),
        ("import sys\nassert sys.stdin.read() == ''\nsys.stdin.readline()[0]", "IndexError"),
        ("import numpy", "ModuleNotFoundError"),
    ],
)
def test_every_other_end_fails_and_says_why(program, reason):
    verdict = ended(program)
    assert not verdict.passed
    assert reason in verdict.reason


def test_exiting_with_zero_before_the_tests_does_not_pass():
    """The oldest trick: the exit code of a suite that never ran."""
    for early in ("import sys; sys.exit(0)", "import os; os._exit(0)", "quit = None; raise SystemExit(0)"):
        assert not ended(f"def check():\n    assert False\n{early}\ncheck()\n").passed


def test_writing_into_every_open_file_forges_no_verdict():
    forge = """
import os
for number in range(3, 64):
    for line in (b'{"token": ""}', b'{"token": true}', b'{"passed": true}', b'[1]', b'x'):
        try:
            os.write(number, line + b"\\n")
        except OSError:
            pass
os._exit(0)
"""
    assert not ended(forge).passed


def test_lines_of_the_wrong_shape_do_not_stop_the_evaluation():
    spoil = """
import os
for number in range(3, 64):
    for line in (b'{"isolation": 5}', b'{"error": [1]}', b'{"token": {}}', b'[' * 20000, bytes([255])):
        try:
            os.write(number, b"\\n" + line + b"\\n")
        except OSError:
            pass
assert False, 'spoilt'
"""
    verdict = ended(spoil)
    assert not verdict.passed and "spoilt" in verdict.reason and verdict.isolation


@pytest.mark.parametrize("program", ["while True: pass", "import time\ntime.sleep(60)"])
def test_a_program_that_does_not_end_is_stopped(program):
    start = time.monotonic()
    verdict = ended(program, Limits(wall_s=1.0))
    assert not verdict.passed and verdict.reason == "timed out"
    assert time.monotonic() - start < 8


@pytest.mark.parametrize(
    "bomb",
    ["x = bytearray(1 << 32)", "x = []\nwhile True: x.append(bytearray(1 << 24))", "x = 'a' * (1 << 33)"],
)
def test_a_memory_bomb_goes_off_inside(bomb):
    verdict = ended(bomb, Limits(wall_s=20.0, memory_bytes=256 << 20))
    assert not verdict.passed and "MemoryError" in verdict.reason


@pytest.mark.parametrize(
    "attempt",
    [
        "import os\nos.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.execv('/bin/true', ['true'])",
        "import multiprocessing\np = multiprocessing.Process(target=print)\np.start()",
        "import os\nos.posix_spawn('/bin/true', ['true'], {})",
    ],
)
def test_new_processes_are_refused(attempt):
    needs("new processes")
    verdict = ended(attempt)
    assert not verdict.passed and "Error" in verdict.reason


def test_threads_are_no_processes():
    """Whoever runs it: a limit on processes would count them, except for root."""
    needs("new processes")
    threads = "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()"
    assert ended(threads).passed


def test_files_outside_cannot_be_written_changed_or_removed(tmp_path):
    needs("files")
    victim = tmp_path / "victim.txt"
    victim.write_text("whole")
    victim.chmod(0o666)
    tmp_path.chmod(0o777)
    for attempt in (
        f"open({str(victim)!r}, 'w').write('spoilt')",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"import os\nos.remove({str(victim)!r})",
        f"import os\nos.rename({str(victim)!r}, {str(tmp_path / 'moved')!r})",
    ):
        assert not ended(attempt).passed
    assert victim.read_text() == "whole" and [p.name for p in tmp_path.iterdir()] == ["victim.txt"]


def test_named_pipes_and_devices_are_files_outside_too(tmp_path):
    """A read-only mount holds back neither."""
    needs("files")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    pipe.chmod(0o666)
    tmp_path.chmod(0o777)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        verdict = ended(f"import os\nos.write(os.open({str(pipe)!r}, os.O_WRONLY), b'escaped')")
        assert "PermissionError" in verdict.reason and os.read(reader, 9) == b""
    finally:
        os.close(reader)
    assert "PermissionError" in ended("open('/dev/zero', 'wb')").reason
    assert ended("open('/dev/null', 'w').write('x')").passed


def test_its_own_folder_takes_little_and_is_gone_afterwards(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tmp_path.chmod(0o777)
    assert ended("open('own', 'w').write('x')\nassert open('own').read() == 'x'").passed
    too_much = Limits(wall_s=20.0, disk_bytes=1 << 20)
    assert "OSError" in ended("open('own', 'wb').write(bytes(2 << 20))", too_much).reason
    assert list(tmp_path.iterdir()) == []


def test_there_is_no_network():
    needs("network")
    verdict = ended("import socket\nsocket.create_connection(('127.0.0.1', 9), 5)")
    assert "not permitted" in verdict.reason or "unreachable" in verdict.reason


def test_no_socket_with_a_path_is_reached(tmp_path, monkeypatch):
    """Not a matter of network namespaces: a container's daemon listens at such a path."""
    needs("network")
    monkeypatch.chdir(tmp_path)  # paths of sockets are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("door")
        server.listen()
        Path("door").chmod(0o666)
        tmp_path.chmod(0o777)
        connect = "socket.socket(socket.AF_UNIX).connect('door')"
        verdict = ended(f"import os, socket\nos.chdir({str(tmp_path)!r})\n{connect}")
        assert not verdict.passed and "PermissionError" in verdict.reason


def test_memory_that_no_limit_counts_is_refused():
    needs("new processes")
    segment = "import ctypes\nassert ctypes.CDLL(None).shmget(0, 4096, 0o1600) == -1"
    assert ended(segment).passed
    assert "PermissionError" in ended("import os\nos.memfd_create('x')").reason


def test_what_leaves_its_group_does_not_outlive_the_end():
    """A program that has taken back to die with its parent, and is in a session of its own."""
    needs("new processes")
    name = secrets.token_hex(6)
    leave = f"""
import ctypes, os, time
libc = ctypes.CDLL(None)
libc.prctl(15, b"{name}", 0, 0, 0)
libc.prctl(1, 0, 0, 0, 0)
try:
    os.setsid()
finally:
    time.sleep(30)
"""
    assert ended(leave, Limits(wall_s=2.0)).reason == "timed out"
    time.sleep(0.2)
    assert not [line for line in running() if name in line]


def running() -> list[str]:
    """The `stat` lines of all processes that are not dead and only waiting to be told so."""
    lines = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            lines.append(file.read_text())
    return [line for line in lines if ") Z " not in line]


@pytest.fixture
def no_namespaces(monkeypatch, tmp_path):
    """A kernel that grants no user namespaces, as some distributions have it."""
    guard = tmp_path / "guard.py"
    guard.write_text(
        "from importlib.util import module_from_spec, spec_from_file_location\n"
        f"spec = spec_from_file_location('guard', {str(sandbox.GUARD)!r})\n"
        "module = module_from_spec(spec)\nspec.loader.exec_module(module)\n"
        "module.namespaces = lambda *_: []\nmodule.main()\n"
    )
    monkeypatch.setattr(sandbox, "GUARD", guard)


def test_without_namespaces_other_walls_stand(no_namespaces, tmp_path):
    needs("new processes")
    verdict = ended("import socket\nsocket.socket()")
    assert "PermissionError" in verdict.reason and "no network" in verdict.isolation
    assert "no other processes in sight" not in verdict.isolation
    if "files read-only outside its own folder" not in verdict.isolation:
        pytest.skip("this kernel has no Landlock")
    victim = tmp_path / "victim.txt"
    victim.write_text("whole")
    for attempt in (f"open({str(victim)!r}, 'w')", f"import os\nos.remove({str(victim)!r})"):
        assert "PermissionError" in ended(attempt).reason
    assert ended("open('own', 'w').write('x')\nassert open('own').read() == 'x'").passed
    assert victim.read_text() == "whole"


def test_other_processes_are_not_in_sight():
    needs("sight")
    assert "ProcessLookupError" in ended(f"import os\nos.kill({os.getpid()}, 0)").reason
    assert "ProcessLookupError" in ended("import os\nos.kill(-1, 9)").reason
    needs("files")
    assert ended("import os\nassert os.listdir('/proc') == []").passed


def test_nothing_of_the_callers_environment_is_inside(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    assert ended("import os\nassert set(os.environ) <= {'LC_CTYPE'}, os.environ").passed


def test_limits_cannot_be_raised_again():
    verdict = ended(
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))", Limits(wall_s=20.0)
    )
    if (
        os.geteuid() != 0
        or "user nobody" in verdict.isolation
        or "files read-only outside its own folder" in verdict.isolation
    ):
        assert "ValueError" in verdict.reason


def test_a_guard_that_has_no_time_to_start_gets_some():
    assert ended("x = 1", Limits(wall_s=0.001)).passed


def test_a_python_that_cannot_start_is_one_error(monkeypatch):
    monkeypatch.setattr(sandbox, "GUARD", Path("/nowhere/guard.py"))
    probe.cache_clear()
    try:
        with pytest.raises(FourfoldError, match="cannot be run in the sandbox"):
            probe()
    finally:
        probe.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
def test_what_was_had_is_said():
    isolation = probe().isolation
    assert set(isolation) <= {"own process", "limits", *WALLS, "user nobody"}
    assert describe([*WALLS]).endswith("no new processes.")
    assert describe(["no network"]).count("no network") == 1
    assert "Not granted on this machine: no other processes in sight" in describe(["no network"])

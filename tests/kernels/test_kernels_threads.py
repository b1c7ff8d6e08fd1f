"""Threads change how fast the C++ kernels are and nothing else."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from kernel_helpers import random_weight, random_x

from fourfold.kernels import set_threads, threads
from fourfold.kernels.cpu import native, share_openmp_threads
from fourfold.kernels.cpu.packed import PackedWeight

pytestmark = pytest.mark.skipif(native is None, reason="the C++ extension is not built")


def weight(n: int, k: int, seed: int = 0) -> PackedWeight:
    return PackedWeight.pack(random_weight(n, k, seed))


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    before = threads()
    yield
    native.expect_contention(False)
    share_openmp_threads(False)
    set_threads(before)


@pytest.mark.parametrize("way", ["quiet", "contended", "openmp"])
@pytest.mark.parametrize("m", [1, 5])
def test_any_number_of_threads_gives_the_same_bits(m, way):
    w, x = weight(1501, 576), random_x(m, 576, torch.bfloat16)
    results = []
    share_openmp_threads(way == "openmp")
    for count in (1, 2, 3, 5):
        set_threads(count)
        assert threads() == count
        native.expect_contention(way == "contended" and count > 1)
        results += [w.linear(x, "exact") for _ in range(20)]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("way", ["quiet", "contended", "openmp"])
def test_callers_in_several_python_threads(way):
    share_openmp_threads(way == "openmp")
    set_threads(3)
    cases = [(weight(700 + i, 576, i), random_x(2 + i, 576, torch.bfloat16, seed=i)) for i in range(4)]
    expected = [w.linear(x) for w, x in cases]
    native.expect_contention(way == "contended")
    wrong: list[int] = []

    def call(i: int) -> None:
        w, x = cases[i]
        wrong.extend(i for _ in range(60) if not torch.equal(w.linear(x), expected[i]))

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for count in (1, 2, 4, 3):  # while they run
        set_threads(count)
    for caller in callers:
        caller.join()
    assert not wrong


def test_the_interpreter_runs_on_while_a_kernel_works():
    set_threads(1)
    w, x = weight(4096, 2048), random_x(32, 2048, torch.float32)
    out = torch.empty(32, 4096)
    before = sys.getswitchinterval()
    sys.setswitchinterval(100)  # nobody is made to hand over: Python runs only where it is let go
    try:
        # on a busy machine the main thread may sleep through one call, though not through all
        assert any(python_ran_during(w, x, out) for _ in range(50)), "the kernel holds the GIL"
    finally:
        sys.setswitchinterval(before)


def python_ran_during(w: PackedWeight, x: torch.Tensor, out: torch.Tensor) -> bool:
    span: list[float] = []

    def work() -> None:
        assert native is not None
        span.append(time.perf_counter())
        native.packed_linear(x, w.data, w.kind, None, out, "exact", "portable")
        span.append(time.perf_counter())

    worker = threading.Thread(target=work)
    ticks: list[float] = []
    worker.start()
    while worker.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.0005)
    return any(span[0] < tick < span[1] for tick in ticks)


@pytest.mark.parametrize("contended", [False, True], ids=["quiet", "contended"])
def test_idle_threads_leave_the_cores_alone(contended):
    set_threads(2)
    native.expect_contention(contended)
    weight(1501, 576).linear(random_x(1, 576, torch.bfloat16))
    time.sleep(0.02)
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.02


TASKS = Path("/proc/self/task")


def run_time(task: Path) -> float:
    """Seconds that a thread of this process has run, by the kernel's account."""
    return int((task / "schedstat").read_text().split()[0]) / 1e9


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs Linux's account of threads")
def test_helpers_work_beside_a_busy_process_on_every_core():
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) == 1:
        pytest.skip("two threads on one core disturb each other, and have no helpers")
    w, x = weight(4096, 2048), random_x(4, 2048, torch.bfloat16)
    set_threads(1)
    before = set(TASKS.iterdir())
    set_threads(2)
    helpers = sorted(set(TASKS.iterdir()) - before, key=lambda task: int(task.name))[1:]
    assert len(helpers) == 2
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in cores]
    try:
        end = time.monotonic() + 15
        while min(map(run_time, helpers)) < 0.05 and time.monotonic() < end:
            w.linear(x)
        assert min(map(run_time, helpers)) >= 0.05
    finally:
        for other in others:
            other.kill()
            other.wait()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_gets_threads_of_its_own():
    set_threads(2)
    w, x = weight(1501, 576), random_x(1, 576, torch.float32)
    expected, out = w.linear(x, "exact"), torch.empty(1, 1501)
    assert native is not None
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        native.packed_linear(x, w.data, w.kind, None, out, "exact")
        os._exit(0 if out.view(torch.int32).tolist() == expected.view(torch.int32).tolist() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_count_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        set_threads(0)

"""Threads change how fast the C++ kernels are and nothing else."""

import os
import signal
import sys
import threading
import time

import pytest
import torch
from kernel_helpers import random_weight, random_x

from fourfold.formats import BlockTensor
from fourfold.kernels import set_threads, threads
from fourfold.kernels.cpu import mxfp4_linear, native

pytestmark = pytest.mark.skipif(native is None, reason="the C++ extension is not built")


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    before = threads()
    yield
    set_threads(before)


@pytest.mark.parametrize("m", [1, 5])
def test_any_number_of_threads_gives_the_same_bits(m):
    w, x = random_weight(1501, 576), random_x(m, 576, torch.bfloat16)
    results = []
    for count in (1, 2, 3, 5):
        set_threads(count)
        assert threads() == count
        results += [mxfp4_linear.multiply(x, w) for _ in range(20)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_callers_in_several_python_threads():
    set_threads(3)
    cases = [
        (random_weight(700 + i, 576, seed=i), random_x(2 + i, 576, torch.bfloat16, seed=i)) for i in range(4)
    ]
    expected = [mxfp4_linear.multiply(x, w) for w, x in cases]
    wrong: list[int] = []

    def call(i: int) -> None:
        w, x = cases[i]
        wrong.extend(i for _ in range(60) if not torch.equal(mxfp4_linear.multiply(x, w), expected[i]))

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
    w, x = random_weight(4096, 2048), random_x(32, 2048, torch.float32)
    out = torch.empty(32, 4096)
    before = sys.getswitchinterval()
    sys.setswitchinterval(100)  # nobody is made to hand over: Python runs only where it is let go
    try:
        # on a busy machine the main thread may sleep through one call, though not through all
        assert any(python_ran_during(w, x, out) for _ in range(50)), "the kernel holds the GIL"
    finally:
        sys.setswitchinterval(before)


def python_ran_during(w: BlockTensor, x: torch.Tensor, out: torch.Tensor) -> bool:
    span: list[float] = []

    def work() -> None:
        assert native is not None
        span.append(time.perf_counter())
        native.mxfp4_linear(x, w.blocks, w.scales, out, "portable")
        span.append(time.perf_counter())

    worker = threading.Thread(target=work)
    ticks: list[float] = []
    worker.start()
    while worker.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.0005)
    return any(span[0] < tick < span[1] for tick in ticks)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_gets_threads_of_its_own():
    set_threads(2)
    w, x = random_weight(1501, 576), random_x(1, 576, torch.bfloat16)
    expected, out = mxfp4_linear.multiply(x, w), torch.empty(1, 1501, dtype=torch.bfloat16)
    assert native is not None
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        native.mxfp4_linear(x, w.blocks, w.scales, out)
        os._exit(0 if out.view(torch.int16).tolist() == expected.view(torch.int16).tolist() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_count_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        set_threads(0)

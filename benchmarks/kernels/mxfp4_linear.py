"""MXFP4 linear against torch's bfloat16 linear, in one run, with every result checked.

    python benchmarks/kernels/mxfp4_linear.py [--threads 2] [--rows 1,4,16] [--seconds 0.4] [--small]

Shapes are those of SmolLM2-135M (hidden 576, MLP 1536, vocabulary 49152) and a 4096 x 4096. Many weights of
each shape are multiplied in turn, more than fit the caches, as in a model. Both sides take turns, and the
tenth percentile of each side's times counts: what a call takes when nothing else has the processor.
``kernel`` and ``expand`` are the two ways behind ``linear``; MOST_ROWS in kernels/cpu/mxfp4_linear.py should
send each M the faster way. The line ``model`` adds up the 211 products of one token of the 135M model.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear as dense_linear

from fourfold.formats import BlockTensor, get_format
from fourfold.kernels import cpu_features, expanded, linear, reference, set_threads
from fourfold.kernels.cpu import mxfp4_linear

# [N, K] and how often a token of the 135M model meets it
SHAPES = {
    (576, 576): 60,
    (192, 576): 60,
    (1536, 576): 60,
    (576, 1536): 30,
    (49152, 576): 1,
    (4096, 4096): 0,
}
WORKING_SET_VALUES = 100_000_000

Way = Callable[[torch.Tensor, Any], torch.Tensor]


def times_us(ways: list[Way], x: torch.Tensor, weights: list[list], seconds: float) -> list[float]:
    """Microseconds of one call of each way, tenth percentile; they take turns for ``seconds`` each."""
    times: list[list[float]] = [[] for _ in ways]
    end = time.perf_counter() + seconds * len(ways)
    while len(times[0]) < 3 or time.perf_counter() < end:
        for way, own, seen in zip(ways, weights, times, strict=True):
            for w in own:
                start = time.perf_counter()
                way(x, w)
                seen.append(time.perf_counter() - start)
    return [sorted(seen)[len(seen) // 10] * 1e6 for seen in times]


def check(x: torch.Tensor, w: BlockTensor) -> None:
    """The timed product is the right one."""
    exact = reference.linear(x.float(), w)
    torch.testing.assert_close(
        linear(x, w).float(), exact, rtol=2**-7, atol=float(exact.abs().max()) * 2**-16
    )


def compare(shape: tuple[int, int], rows: int, seconds: float) -> tuple[float, float]:
    """Prints one line; returns torch's and our time in microseconds."""
    n, k = shape
    count = max(1, min(100, WORKING_SET_VALUES // (n * k)))
    packed = [get_format("mxfp4").quantize(torch.randn(n, k) * 0.05) for _ in range(count)]
    dense = [w.dequantize(torch.bfloat16) for w in packed]
    x = torch.randn(rows, k).bfloat16()
    check(x, packed[0])
    ways: list[Way] = [
        dense_linear,
        linear,
        mxfp4_linear.multiply,
        lambda x, w: expanded.linear(x, w, mxfp4_linear.expand),
    ]
    torch_us, ours_us, kernel_us, expand_us = times_us(ways, x, [dense, packed, packed, packed], seconds)
    name = f"{n}x{k}"
    print(
        f"{name:>12} {rows:>4} {torch_us:>10.1f} {ours_us:>10.1f} {torch_us / ours_us:>7.2f} "
        f"{kernel_us:>10.1f} {expand_us:>10.1f}",
        flush=True,
    )
    return torch_us, ours_us


def main() -> None:
    """Measure every shape at every number of rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", default="1,4,8,16,32,128,512")
    parser.add_argument("--seconds", type=float, default=0.4, help="for each way of each line")
    parser.add_argument("--small", action="store_true", help="leave out the two largest shapes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    set_threads(options.threads)
    torch.manual_seed(0)
    print(f"threads {options.threads}, torch {torch.__version__}, {cpu_features()}; times in microseconds")
    print(
        f"{'N x K':>12} {'M':>4} {'torch bf16':>10} {'linear':>10} {'ratio':>7} {'kernel':>10} {'expand':>10}"
    )
    shapes = [shape for shape in SHAPES if not options.small or shape[0] * shape[1] < 2_000_000]
    with torch.inference_mode():
        for rows in map(int, options.rows.split(",")):
            times = {shape: compare(shape, rows, options.seconds) for shape in shapes}
            theirs, ours = (sum(SHAPES[shape] * t[i] for shape, t in times.items()) / 1e3 for i in (0, 1))
            print(f"   model, M={rows}: torch {theirs:.2f} ms, linear {ours:.2f} ms: {theirs / ours:.2f}x")


if __name__ == "__main__":
    main()

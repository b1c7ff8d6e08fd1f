"""Packed linear layers against torch's bfloat16 linear, every result checked.

    python benchmarks/kernels/packed_linear.py [--threads 2] [--rows 1,8,32,512] [--seconds 0.3] [--model 1b]

Shapes are those of SmolLM2-135M and of a Llama of 1.07 B parameters. Many weights of each shape are
multiplied in turn, more than fit the caches, as in a model. All sides take turns, and the tenth percentile of
each side's times counts: what a call takes when nothing else has the processor. GOPS count a multiplication
and an addition as two; GB/s are bytes of packed weights. ``--isa`` names the instructions of our sides.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch.nn.functional import linear as dense_linear

from fourfold.formats import BlockTensor, get_format
from fourfold.kernels import reference, set_threads
from fourfold.kernels.cpu.packed import PackedWeight, packed_isas

SHAPES = {
    "135m": [(960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576)],
    "1b": [(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)],
}
WORKING_SET_VALUES = 80_000_000


def times_us(ways: dict[str, Callable[[int], object]], count: int, seconds: float) -> dict[str, float]:
    """Microseconds of one call of each way on weight 0 .. count - 1, tenth percentile; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    end = time.perf_counter() + seconds * len(ways)
    while time.perf_counter() < end or len(times[next(iter(ways))]) < 3:
        for name, way in ways.items():
            for i in range(count):
                start = time.perf_counter()
                way(i)
                times[name].append(time.perf_counter() - start)
    return {name: sorted(seen)[len(seen) // 10] * 1e6 for name, seen in times.items()}


def check(x: torch.Tensor, w: BlockTensor, packed: PackedWeight, isa: str) -> None:
    """The timed products are the right ones."""
    rounded = reference.read_int8_blocks(*reference.round_to_int8_blocks(x))
    for arithmetic, factor in (("int8", rounded), ("exact", x)):
        expected = reference.linear(factor, w)
        tolerance = float(expected.abs().max()) * 2**-16
        torch.testing.assert_close(packed.linear(x, arithmetic, isa), expected, rtol=2**-16, atol=tolerance)


def compare(shape: tuple[int, int], rows: int, seconds: float, isa: str) -> None:
    """Prints one line."""
    n, k = shape
    count = max(1, min(40, WORKING_SET_VALUES // (n * k)))
    first = get_format("mxfp4").quantize(torch.randn(n, k) * 0.05)
    packed = [PackedWeight.pack(first) for _ in range(count)]
    dense = [first.dequantize(torch.bfloat16) for _ in range(count)]
    half = torch.randn(rows, k).bfloat16()
    x = half.float()
    check(x, first, packed[0], isa)
    ways: dict[str, Callable[[int], object]] = {
        "torch": lambda i: dense_linear(half, dense[i]),
        "exact": lambda i: packed[i].linear(x, "exact", isa),
        "int8": lambda i: packed[i].linear(x, "int8", isa),
    }
    us = times_us(ways, count, seconds)
    gops, rate = 2e-3 * rows * n * k / us["int8"], packed[0].data.nbytes / us["int8"] * 1e-3
    print(
        f"{f'{n}x{k}':>12} {rows:>4} {us['torch']:>10.1f} {us['exact']:>10.1f} {us['int8']:>10.1f} "
        f"{us['torch'] / us['int8']:>8.2f} {us['torch'] / us['exact']:>8.2f} {gops:>7.0f} {rate:>6.1f}",
        flush=True,
    )


def main() -> None:
    """Measure every shape at every number of rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", default="1,8,32,512")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each way of each line")
    parser.add_argument("--isa", choices=["auto", *packed_isas()], default="auto")
    parser.add_argument("--model", choices=SHAPES, help="the shapes of one model only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    set_threads(options.threads)
    torch.manual_seed(0)
    print(f"threads {options.threads}, torch {torch.__version__}, {packed_isas()}; times in microseconds")
    print(
        f"{'N x K':>12} {'M':>4} {'torch bf16':>10} {'exact':>10} {'int8':>10} "
        f"{'int8':>8} {'exact':>8} {'GOPS':>7} {'GB/s':>6}"
    )
    with torch.inference_mode():
        for model in [options.model] if options.model else SHAPES:
            for rows in map(int, options.rows.split(",")):
                for shape in SHAPES[model]:
                    compare(shape, rows, options.seconds, options.isa)


if __name__ == "__main__":
    main()

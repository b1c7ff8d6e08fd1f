"""Attention over the paged cache in C++ against torch's SDPA on the gathered cache, in one run, checked.

    python benchmarks/kernels/attention.py [--threads 2] [--model 135m] [--kv bf16] [--seconds 0.5]

Torch's side is what engine/attention.py does without C++: gather the blocks, then SDPA in bfloat16. Many
caches, more than fit the processor's, are used in turn, as the layers of a model are. Both sides take turns,
and the tenth percentile of each side's times counts. ``GB/s`` is the keys and values read once, ``GFLOP/s``
counts the multiplications and additions of the pairs (query, key) that causality leaves, ``error`` is ours
against float32 as a share of torch's.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.kernels import set_threads
from fourfold.kernels.cpu import attention, native
from fourfold.kernels.cpu.attention import Softmax

# heads, key heads, head_dim
MODELS = {"135m": (9, 3, 64), "1b": (32, 8, 64), "8b": (32, 8, 128), "gemma3-270m": (4, 1, 256)}
# name: spans (start, count)
STEPS = {
    "decode 128": [(127, 1)],
    "decode 1024": [(1023, 1)],
    "decode 8192": [(8191, 1)],
    "decode 8 x 512": [(511, 1)] * 8,
    "decode 32 x 256": [(255, 1)] * 32,
    "verify 5 at 1024": [(1019, 5)],
    "prefill 128": [(0, 128)],
    "prefill 512": [(0, 512)],
    "chunk 512 at 1536": [(1536, 512)],
}
SIZE = 16
WORKING_SET_BYTES = 96 << 20


@dataclass
class Case:
    """One layer's cache and what stands in it."""

    q: Tensor
    cache: Tensor
    spans: Tensor
    tables: Tensor
    scales: Tensor | None
    out: Tensor

    def ours(self) -> Tensor:
        """C++, into memory that is there already, as the engine's is."""
        softmax = Softmax(self.q.shape[-1] ** -0.5)
        return attention.attend(
            self.q, self.cache, self.spans, self.tables, softmax, self.scales, out=self.out
        )

    def theirs(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Torch: the blocks gathered, then SDPA; one batch, for the sequences of a case are equally long."""
        stored = self.cache[self.tables]
        if self.scales is not None:
            stored = stored.view(torch.float8_e4m3fn).to(dtype) * self.scales.to(dtype)[:, None]
        count, start = self.spans[0, 1:].tolist()
        kv = stored.flatten(1, 2)[:, : start + count].transpose(1, 2).to(dtype)
        keys, values = kv.chunk(2, 1)
        batch, heads, _, width = keys.shape
        q = self.q.to(dtype)
        if count == 1:
            return F.scaled_dot_product_attention(q.view(batch, heads, -1, width), keys, values).flatten(1, 2)
        q = q.view(batch, count, -1, width).transpose(1, 2)
        mask = torch.ones(count, start + count, dtype=torch.bool).tril(start) if start else None
        out = F.scaled_dot_product_attention(q, keys, values, mask, is_causal=mask is None, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)


def make(spans: list[tuple[int, int]], shape: tuple[int, int, int], kv: str) -> Case:
    """Blocks of the sequences lie in the cache in a random order."""
    heads, kv_heads, width = shape
    blocks = [-(-(start + count) // SIZE) for start, count in spans]
    values = torch.randn(sum(blocks), SIZE, 2 * kv_heads, width)
    scales = torch.full((2 * kv_heads,), 0.02) if kv == "fp8" else None
    cache = values.bfloat16() if scales is None else (values / 0.02).to(torch.float8_e4m3fn).view(torch.uint8)
    tables = torch.randperm(sum(blocks)).int().view(len(spans), -1)
    counts = torch.tensor([0] + [count for _, count in spans]).cumsum(0).tolist()
    rows = [(row, count, start) for row, (start, count) in zip(counts, spans, strict=False)]
    q = torch.randn(counts[-1], heads, width)
    return Case(q, cache, torch.tensor(rows), tables, scales, torch.empty_like(q))


def check(case: Case) -> float:
    """Root mean square of our error against float32, as a share of torch's in bfloat16."""
    want = case.theirs(torch.float32)
    theirs, ours = (
        float((got.float() - want).square().mean().sqrt()) for got in (case.theirs(), case.ours())
    )
    assert ours <= theirs, f"error {ours} against torch's {theirs}"
    return ours / theirs


def times_us(ways: list[Callable[[Case], Tensor]], cases: list[Case], seconds: float) -> list[float]:
    """Microseconds of one call of each way, tenth percentile; they take turns for ``seconds`` each."""
    times: list[list[float]] = [[] for _ in ways]
    end = time.perf_counter() + seconds * len(ways)
    while len(times[0]) < 3 or time.perf_counter() < end:
        for way, seen in zip(ways, times, strict=True):
            for case in cases:
                start = time.perf_counter()
                way(case)
                seen.append(time.perf_counter() - start)
    return [sorted(seen)[len(seen) // 10] * 1e6 for seen in times]


def compare(name: str, shape: tuple[int, int, int], kv: str, seconds: float) -> None:
    """Prints one line."""
    spans, (heads, _, width) = STEPS[name], shape
    first = make(spans, shape, kv)
    count = max(1, min(60, WORKING_SET_BYTES // first.cache.nbytes))
    cases = [first] + [make(spans, shape, kv) for _ in range(count - 1)]
    error = check(first)
    theirs_us, ours_us = times_us([Case.theirs, Case.ours], cases, seconds)
    pairs = sum(count * start + count * (count + 1) // 2 for start, count in spans)
    gflops = pairs * heads * width * 4 / ours_us / 1e3
    print(
        f"{name:>18} {theirs_us:>10.1f} {ours_us:>10.1f} {theirs_us / ours_us:>7.2f} "
        f"{first.cache.nbytes / ours_us / 1e3:>7.1f} {gflops:>9.1f} {error:>7.2f}",
        flush=True,
    )


def main() -> None:
    """Measure every step of one model and KV type."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", choices=list(MODELS), default="135m")
    parser.add_argument("--kv", choices=["bf16", "fp8"], default="bf16")
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--seconds", type=float, default=0.4, help="for each way of each line")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    set_threads(options.threads)
    torch.manual_seed(0)
    print(
        f"{options.model}, {options.kv}, threads {options.threads}, torch {torch.__version__}, "
        f"{native.attention_isas() if native else None}"
    )
    print(f"{'':>18} {'torch us':>10} {'ours us':>10} {'ratio':>7} {'GB/s':>7} {'GFLOP/s':>9} {'error':>7}")
    with torch.inference_mode():
        for name in options.steps.split(","):
            compare(name, MODELS[options.model], options.kv, options.seconds)


if __name__ == "__main__":
    main()

"""C++ attention against float64 torch: odd lengths, mixed batches, windows, sinks, softcap, every KV type."""

import itertools
import math

import pytest
import torch

from fourfold.kernels import set_threads, threads
from fourfold.kernels.cpu import attention, native
from fourfold.kernels.cpu.attention import Softmax

pytestmark = pytest.mark.skipif(native is None, reason="the C++ extension is not built")
ISAS = native.attention_isas() if native is not None else []
TYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "fp8": torch.uint8}
SIZE = 16

each_isa = pytest.mark.parametrize("isa", ISAS)
each_type = pytest.mark.parametrize("kind", TYPES)


def e4m3(values, scales):
    """Codes of [..., 2 * kv_heads, D] as the engine's FP8 cache holds them."""
    codes = (values / scales[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8)


class Step:
    """Queries and a filled cache for spans (start, count); blocks lie in the cache in a random order."""

    def __init__(self, spans, heads=3, kv_heads=1, width=64, kind="bf16", loud=1.0, seed=0):
        make = torch.Generator().manual_seed(seed)
        blocks = [-(-(start + count) // SIZE) for start, count in spans]
        order = torch.randperm(sum(blocks), generator=make).int() + 1
        self.tables = torch.zeros(len(spans), max(blocks), dtype=torch.int32)
        for row, part in zip(self.tables, order.split(blocks), strict=True):
            row[: len(part)] = part
        rows = torch.tensor([0] + [count for _, count in spans]).cumsum(0)
        self.spans = torch.tensor([(r, c, s) for r, (s, c) in zip(rows[:-1].tolist(), spans, strict=True)])
        self.q = torch.randn(int(rows[-1]), heads, width, generator=make) * loud
        self.scales = None
        values = torch.randn(sum(blocks) + 1, SIZE, 2 * kv_heads, width, generator=make)
        if kind == "fp8":
            self.scales = torch.rand(2 * kv_heads, generator=make) * 0.1 + 0.01
            self.cache = e4m3(values, self.scales)
        else:
            self.cache = values.to(TYPES[kind])

    def keys_and_values(self, index):
        """[positions, 2 * kv_heads, D] in float64 of a span."""
        stored = self.cache[self.tables[index].long()].flatten(0, 1)
        if self.scales is None:
            return stored.double()
        return stored.view(torch.float8_e4m3fn).double() * self.scales.double()[:, None]

    def run(self, softmax, isa="auto"):
        return attention.attend(self.q, self.cache, self.spans, self.tables, softmax, self.scales, isa)


def exact(step, softmax):
    """The definition in cpp/attention.h, in float64."""
    out = torch.zeros(step.q.shape, dtype=torch.float64)
    for index, (row, count, start) in enumerate(step.spans.tolist()):
        kv = step.keys_and_values(index)[: start + count]
        group = step.q.shape[1] // (kv.shape[1] // 2)
        keys, values = (x.repeat_interleave(group, 1) for x in kv.chunk(2, 1))
        scores = torch.einsum("thd,shd->hts", step.q[row : row + count].double(), keys) * softmax.scale
        if softmax.softcap:
            scores = torch.tanh(scores / softmax.softcap) * softmax.softcap
        position, key = torch.arange(start, start + count)[:, None], torch.arange(start + count)
        unseen = key > position
        if softmax.window:
            unseen |= key <= position - softmax.window
        scores = scores.masked_fill(unseen, -math.inf)
        if softmax.sinks is not None:
            sinks = softmax.sinks.double()[:, None, None].expand(-1, count, 1)
            scores = torch.cat([scores, sinks], -1)
        weights = scores.softmax(-1)[..., : start + count]
        out[row : row + count] = torch.einsum("hts,shd->thd", weights, values)
    return out


def check(step, softmax, isa):
    """Within the rounding of scores as loud as the loudest product of norms, and of weights."""
    bf16 = isa == "avx512bf16" and step.cache.dtype != torch.float32
    got, want = step.run(softmax, isa), exact(step, softmax)
    kv = [step.keys_and_values(i).flatten(0, 1) for i in range(len(step.spans))]
    loudest = softmax.scale * step.q.norm(dim=-1).max() * max(float(x.norm(dim=-1).max()) for x in kv)
    allowed = (2.0**-9 if bf16 else 2.0**-22) * (1 + loudest) * max(float(x.abs().max()) for x in kv)
    assert (got.double() - want).abs().max() <= allowed


def plain(width):
    return Softmax(width**-0.5)


@each_isa
@each_type
@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 33, 255, 256, 257, 513])
def test_decode_around_blocks_and_tiles(isa, kind, length):
    step = Step([(length - 1, 1)], heads=6, kv_heads=2, kind=kind, seed=length)
    check(step, plain(64), isa)


@each_isa
@each_type
@pytest.mark.parametrize(
    ("start", "count"), [(0, 1), (0, 17), (0, 131), (5, 50), (250, 13), (256, 40), (511, 3)]
)
def test_prefill_chunks(isa, kind, start, count):
    step = Step([(start, count)], heads=6, kv_heads=2, kind=kind, seed=count)
    check(step, plain(64), isa)


@each_isa
@each_type
@pytest.mark.parametrize("width", [16, 32, 48, 64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (5, 1), (14, 2)])
def test_head_dims_and_groups(isa, kind, width, heads, kv_heads):
    step = Step([(40, 1), (0, 21), (260, 5)], heads, kv_heads, width, kind)
    check(step, plain(width), isa)


@each_isa
@each_type
@pytest.mark.parametrize("window", [1, 7, 16, 100, 256, 300])
def test_windows(isa, kind, window):
    step = Step([(299, 1), (0, 70), (240, 40), (600, 2)], kind=kind)
    check(step, Softmax(0.125, window=window), isa)


@each_isa
@each_type
def test_sinks_softcap_and_window_together(isa, kind):
    step = Step([(299, 1), (0, 70), (240, 40)], heads=4, kv_heads=2, kind=kind, loud=8.0)
    sinks = torch.tensor([-math.inf, -3.0, 2.0, 60.0])
    check(step, Softmax(0.2, sinks=sinks), isa)
    check(step, Softmax(0.2, softcap=5.0), isa)
    check(step, Softmax(0.2, softcap=30.0, window=130, sinks=sinks), isa)


@each_isa
@each_type
def test_a_row_depends_on_neither_batch_nor_chunks_nor_threads(isa, kind):
    length, before = 300, threads()
    whole = Step([(0, length)], heads=6, kv_heads=2, kind=kind)
    want = whole.run(plain(64), isa)
    cuts = [0, 1, 2, 60, 255, 256, 258, 299, length]
    chunks = list(itertools.pairwise(cuts))
    try:
        for count in (1, 2, 3):
            set_threads(count)
            assert torch.equal(whole.run(plain(64), isa), want)
            for begin, end in chunks:
                part = torch.tensor([[begin, end - begin, begin]])
                got = attention.attend(whole.q, whole.cache, part, whole.tables, plain(64), whole.scales, isa)
                assert torch.equal(got[begin:end], want[begin:end])
        spans = torch.tensor([[begin, end - begin, begin] for begin, end in chunks])
        tables = whole.tables.expand(len(chunks), -1).contiguous()
        assert torch.equal(
            attention.attend(whole.q, whole.cache, spans, tables, plain(64), whole.scales, isa), want
        )
    finally:
        set_threads(before)


@each_isa
def test_what_lies_beyond_a_sequence_is_not_read(isa):
    step = Step([(20, 1)])
    want = step.run(plain(64), isa)
    step.cache[step.tables[0, 1].long(), 5:] = math.nan
    assert torch.equal(step.run(plain(64), isa), want)


@each_isa
def test_a_nan_stays_with_its_sequence(isa):
    step = Step([(20, 1), (0, 9), (300, 1)])
    step.cache[step.tables[1, 0].long(), 0, 0, 3] = math.nan
    got = step.run(plain(64), isa)
    assert got[1:10].isnan().all() and got[[0, 10]].isfinite().all()


@each_isa
@each_type
def test_writing(isa, kind):
    make = torch.Generator().manual_seed(0)
    kv = torch.randn(21, 4, 48, generator=make) * torch.logspace(-8, 4, 21)[:, None, None]
    kv[0, 0, :4] = torch.tensor([math.inf, -math.inf, math.nan, -0.0])
    slots = torch.randperm(5 * SIZE, generator=make)[:21]
    scales = torch.rand(4, generator=make) + 0.5 if kind == "fp8" else None
    cache = torch.zeros(5, SIZE, 4, 48, dtype=TYPES[kind])
    attention.write(kv, cache, slots.int(), scales, isa)
    want = torch.zeros_like(cache)
    want.flatten(0, 1)[slots] = kv.to(TYPES[kind]) if scales is None else e4m3(kv, scales)
    assert torch.equal(cache.float().nan_to_num(nan=-1e30), want.float().nan_to_num(nan=-1e30))


@each_isa
def test_every_e4m3_code_is_read_exactly(isa):
    codes = torch.arange(256, dtype=torch.uint8)
    cache = torch.zeros(1, SIZE, 2, 256, dtype=torch.uint8)
    cache[0, 0, 1] = codes
    values = codes.view(torch.float8_e4m3fn).float().nan_to_num(nan=-1e30)
    for heads in (1, 10):
        spans, table = torch.tensor([[0, 1, 0]]), torch.zeros(1, 1, dtype=torch.int32)
        out = attention.attend(torch.zeros(1, heads, 256), cache, spans, table, plain(256), isa=isa)
        assert (out[0].nan_to_num(nan=-1e30) == values).all()


@each_isa
def test_every_float_of_the_border_becomes_the_right_code(isa):
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halves = (codes[1:] + codes[:-1]) / 2
    up, down = halves.nextafter(torch.tensor(1e9)), halves.nextafter(torch.tensor(-1e9))
    kv = torch.cat([codes, halves, up, down, torch.tensor([448.1, 464.0, 1e30])])
    kv = torch.cat([kv, -kv, torch.zeros(-2 * len(kv) % 32)]).view(-1, 2, 16)
    cache = torch.zeros(1, len(kv), 2, 16, dtype=torch.uint8)
    attention.write(kv, cache, torch.arange(len(kv)).int(), isa=isa)
    assert torch.equal(cache[0], e4m3(kv, torch.ones(2)))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": torch.ones(1, 64, dtype=torch.bfloat16)}, ValueError, "q must be float32"),
        ({"q": torch.ones(1, 65)}, ValueError, "q must be"),
        ({"cache": torch.ones(4, 16 * 64)}, ValueError, "cache must be"),
        ({"cache": torch.ones(4, 16 * 128, dtype=torch.float16)}, ValueError, "cache must be float32"),
        ({"spans": torch.tensor([[0, 2, 0]])}, ValueError, "outside q"),
        ({"spans": torch.tensor([[0, 1, 32]])}, ValueError, "too short"),
        ({"tables": torch.tensor([[1, 4]], dtype=torch.int32)}, ValueError, "not there"),
        ({"tables": torch.tensor([[1, 2]])}, ValueError, "integer type"),
        ({"out": torch.ones(2, 64)}, ValueError, "out has the wrong shape"),
        ({"scale": 0.0}, ValueError, "scale must be"),
        ({"head_dim": 24}, ValueError, "head_dim must be"),
        ({"sinks": torch.ones(1, 3)}, ValueError, "sinks has the wrong shape"),
        ({"isa": "neon"}, ValueError, "isa must be one of"),
    ],
)
def test_the_extension_refuses_what_does_not_fit(change, error, words):
    call = {
        "q": torch.ones(1, 64),
        "cache": torch.ones(4, 16 * 2 * 64),
        "spans": torch.tensor([[0, 1, 20]]),
        "tables": torch.tensor([[1, 2]], dtype=torch.int32),
        "out": torch.ones(1, 64),
        "kv_heads": 1,
        "head_dim": 64,
        "block_size": 16,
        "scale": 0.125,
    }
    assert native is not None
    native.attention(**call)
    with pytest.raises(error, match=words):
        native.attention(**(call | change))

"""Programs in C++: what each operation computes, and what a step must be like. Models: tests/engine."""

import math
from array import array
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from kernel_helpers import random_weight, values_of

from fourfold.kernels import native_available, set_threads, threads

pytestmark = pytest.mark.skipif(not native_available(), reason="the C++ extension is not built")

if native_available():
    from fourfold.kernels.cpu.packed import PackedWeight
    from fourfold.kernels.cpu.program import Gate, InputScheme, Mixture, Program

ROWS, VOCABULARY, WIDTH = 200, 96, 64
GATES = {
    "silu": lambda g, u: g / (1 + np.exp(-g)) * u,
    "gelu-tanh": lambda g, u: 0.5 * g * (1 + np.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * u,
    "clamped-swish": lambda g, u: (
        np.minimum(g, 2.0) / (1 + np.exp(-1.5 * np.minimum(g, 2.0))) * (np.clip(u, -2.0, 2.0) + 1)
    ),
}


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    before = threads()
    yield
    set_threads(before)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight(n: int, k: int, seed: int = 0) -> tuple["PackedWeight", np.ndarray]:
    held = random_weight(n, k, seed)
    return PackedWeight.pack(held), values_of(held)


def program(rows: int = ROWS) -> "Program":
    made = Program(rows, VOCABULARY, 256)
    made.native.use_cache(torch.zeros(1, 64 * 16, dtype=torch.bfloat16), 64, 16)
    return made


def step(rows: int, chosen: Sequence[int] = ()) -> tuple[array, array, array, array]:
    tokens = array("i", [i % VOCABULARY for i in range(rows)])
    blocks = -(-rows // 16)
    return tokens, array("i", (rows, 0, blocks)), array("i", range(blocks)), array("i", chosen)


def assert_close(ours: torch.Tensor, exact: np.ndarray, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(ours.numpy(), exact, rtol=0, atol=tolerance * np.abs(exact).max())


@pytest.mark.parametrize("rows", [1, 7, 129, 200])
@pytest.mark.parametrize("gate", GATES)
def test_an_mlp_by_halves_of_one_weight(gate, rows):
    """Gate, up and down: with the gate in the linear layer, and on its own."""
    p, x = program(), random(ROWS, WIDTH)
    (gate_up, w1), (down, w2) = weight(2 * 96, WIDTH, 1), weight(WIDTH, 96, 2)
    said = Gate(gate, 1.5 if gate == "clamped-swish" else 1.0, 2.0)
    states, both, first, second = (p.buffer(n) for n in (WIDTH, 2 * 96, 96, 96))
    p.prepared(states, ["exact"])
    p.gated_linear(gate_up, "exact", said, first)
    p.linear(gate_up, "exact", both)
    p.gated(both, said, second)
    p.prepared(first, ["exact"])
    p.linear(down, "exact", states, accumulate=True)
    states.first(ROWS).copy_(x)
    p.run(*step(rows))
    rounded = x[:rows].bfloat16().double().numpy()
    hidden = GATES[gate](rounded @ w1[:96].T, rounded @ w1[96:].T)
    assert_close(first.first(rows), hidden)
    assert torch.equal(first.first(rows), second.first(rows))
    exact = x[:rows].double().numpy() + first.first(rows).bfloat16().double().numpy() @ w2.T
    assert_close(states.first(rows), exact)
    assert torch.equal(states.first(ROWS)[rows:], x[rows:])


@pytest.mark.parametrize("rows", [1, 7, 33, 129, 200])
@pytest.mark.parametrize("arithmetic", ["int8", "exact"])
@pytest.mark.parametrize("activation", [None, "mxfp4", "mxfp8-e4m3"])
def test_what_is_gated_and_prepared_at_once_is_what_is_stored_between(rows, arithmetic, activation):
    said, wide = Gate("silu", 1.0, 0.0), 2176
    set_threads(2)
    scheme = InputScheme(None, activation)
    gate_up, down = weight(2 * wide, WIDTH, 1)[0], weight(WIDTH, wide, 2)[0]
    p = Program(ROWS, VOCABULARY, wide)
    p.native.use_cache(torch.zeros(1, 64 * 16, dtype=torch.bfloat16), 64, 16)
    states, between, first, second = (p.buffer(n) for n in (WIDTH, wide, WIDTH, WIDTH))
    p.prepared(states, [arithmetic])
    p.gated_linear(gate_up, arithmetic, said, between)
    p.gated_input(gate_up, arithmetic, said, arithmetic, scheme)
    p.linear(down, arithmetic, first)
    p.prepared(between, [arithmetic], scheme=scheme)
    p.linear(down, arithmetic, second)
    states.first(ROWS).copy_(random(ROWS, WIDTH))
    p.run(*step(rows))
    assert torch.equal(first.first(rows), second.first(rows)) and first.first(rows).abs().max() > 0


def test_norms_choose_rows_and_add():
    p, x, w = program(), random(ROWS, WIDTH, seed=3), random(WIDTH, seed=4)
    states, added = p.buffer(WIDTH), p.buffer(WIDTH)
    head, values = weight(VOCABULARY, WIDTH, 5)
    norm = (w * WIDTH**0.5, WIDTH * 1e-5)
    p.add_normed(added, norm, states)
    p.choose(states)
    p.prepared(states, ["exact"], norm)
    p.head(head, "exact", 0.0)
    states.first(ROWS).copy_(x)
    added.first(ROWS).copy_(2 * x)
    chosen = [0, 5, 6, 199]
    p.run(*step(ROWS, chosen))
    sums = x + torch.nn.functional.rms_norm(2 * x, (WIDTH,), w, 1e-5)
    assert_close(states.first(4), sums[chosen].numpy())
    assert_close(states.first(ROWS)[4:], sums[4:].numpy())
    normed = torch.nn.functional.rms_norm(states.first(4), (WIDTH,), w, 1e-5)
    logits = normed.bfloat16().double().numpy() @ values.T
    assert_close(p.logits.first(4), logits, 3e-3)  # a norm on the edge of two bfloat16s may fall either way
    assert p.tokens[0, :4].tolist() == p.logits.first(4).argmax(-1).tolist()


def test_the_largest_logit_is_the_first_of_equals_and_any_nan():
    p = program()
    states = p.buffer(WIDTH)
    rows = torch.zeros(VOCABULARY, WIDTH)
    rows[[17, 40], 0] = 1.0
    p.choose(states)
    p.prepared(states, ["exact"])
    p.head(PackedWeight.pack(rows.bfloat16()), "exact", 0.0)
    states.first(ROWS).zero_()
    states.data[0, 0], states.data[1, 0], states.data[2, 0] = 2.0, -2.0, torch.nan
    p.run(*step(3, (0, 1, 2)))
    assert p.tokens[0, :3].tolist() == [17, 0, 0]


def test_capped_logits():
    p = program()
    states, (head, values) = p.buffer(WIDTH), weight(VOCABULARY, WIDTH, 6)
    p.choose(states)
    p.prepared(states, ["exact"])
    p.head(head, "exact", 0.5)
    x = random(ROWS, WIDTH).bfloat16().float()
    states.first(ROWS).copy_(x)
    p.run(*step(2, (0, 1)))
    exact = 0.5 * np.tanh(x[:2].double().numpy() @ values.T / 0.5)
    assert_close(p.logits.first(2), exact)
    assert p.tokens[0, :2].tolist() == p.logits.first(2).argmax(-1).tolist()


@pytest.mark.parametrize("rows", [1, 30, 200])
@pytest.mark.parametrize("among_chosen", [True, False])
def test_a_mixture_of_experts(rows, among_chosen):
    p, x, norm = program(), random(ROWS, WIDTH), random(WIDTH, seed=1)
    router, bias = random(5, WIDTH, seed=2), random(5, seed=3)
    gate_up = [weight(2 * 32, WIDTH, i) for i in range(5)]
    down = [weight(WIDTH, 32, 10 + i) for i in range(5)]
    mixture = Mixture(
        (norm * WIDTH**0.5, WIDTH * 1e-5), router, bias, [w for w, _ in gate_up], [w for w, _ in down],
        32, 2, among_chosen, Gate("silu", 1.0, 0.0), ("exact", "exact"),
    )  # fmt: skip
    states, out = p.buffer(WIDTH), p.buffer(WIDTH)
    p.mixture(states, mixture, out, accumulate=False)
    states.first(ROWS).copy_(x)
    p.run(*step(rows))
    normed = torch.nn.functional.rms_norm(x[:rows], (WIDTH,), norm, 1e-5)
    logits = (normed.double() @ router.double().T + bias.double()).numpy()
    order = np.argsort(-logits, -1)[:, :2]
    exps = np.exp(logits)
    exact = np.zeros((rows, WIDTH))
    for row in range(rows):
        whole = exps[row, order[row]].sum() if among_chosen else exps[row].sum()
        for e in order[row]:
            made = normed[row].bfloat16().double().numpy() @ gate_up[e][1].T
            hidden = torch.tensor(GATES["silu"](made[:32], made[32:])).bfloat16().double().numpy()
            exact[row] += exps[row, e] / whole * (hidden @ down[e][1].T)
    assert_close(out.first(rows), exact, 4e-3)


def test_any_number_of_threads_and_rows_gives_the_same_bits():
    results = []
    for count in (1, 2, 5):
        set_threads(count)
        p = program()
        states, made = p.buffer(WIDTH), p.buffer(1008)
        p.prepared(states, ["int8"])
        p.linear(weight(1008, WIDTH)[0], "int8", made)
        states.first(ROWS).copy_(random(ROWS, WIDTH))
        for rows in (ROWS, 150, 1):
            p.run(*step(rows))
            results.append(made.first(rows).clone())
    assert all(torch.equal(result, results[0][: len(result)]) for result in results)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"tokens": [VOCABULARY]}, "vocabulary"),
        ({"tokens": [-1]}, "vocabulary"),
        ({"spans": [2, 0, 1]}, "do not cover"),
        ({"spans": [1, 16, 1]}, "longer than its table"),
        ({"spans": [0, 0, 1]}, "empty"),
        ({"spans": [1, 0]}, "three integers"),
        ({"tables": [64]}, "block that is not there"),
        ({"tables": [-1]}, "block that is not there"),
        ({"chosen": [1]}, "chosen row is not there"),
        ({"chosen": [0, 0]}, "not in their order"),
        ({"tokens": [0] * 201, "spans": [201, 0, 13], "tables": range(13)}, "more rows"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_a_step_that_does_not_fit_is_refused(change, problem):
    given = {"tokens": [0], "spans": [1, 0, 1], "tables": [3], "chosen": [0]} | change
    with pytest.raises(ValueError, match=problem):
        program().run(*(array("i", given[name]) for name in ("tokens", "spans", "tables", "chosen")))


def test_buffers_that_are_too_small_are_refused():
    p, (w, _) = program(), weight(96, WIDTH)
    with pytest.raises(ValueError, match="too small"):
        p.linear(w, "int8", p.buffer(80))
    with pytest.raises(ValueError, match="blocks of 32"):
        p.gated_input(weight(2 * 48, WIDTH)[0], "int8", Gate("silu", 1.0, 0.0), "int8")
    with pytest.raises(ValueError, match="no such operations"):
        p.run(*step(1), first=0, end=1)

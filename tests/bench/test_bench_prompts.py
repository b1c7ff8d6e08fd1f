"""Prompts and workloads: exact, safe, all different."""

import json

import pytest

from fourfold.bench.prompts import (
    UNKNOWN_VOCABULARY,
    TokenRange,
    make_prompt,
    range_of_folder,
    range_of_tokenizer,
    range_within,
)
from fourfold.bench.workload import get_workload, workload_names
from fourfold.core.errors import UsageError


def test_shipped_workloads():
    shapes = {n: (get_workload(n).input_tokens, get_workload(n).output_tokens) for n in workload_names()}
    assert shapes == {
        "chat": (128, 128),
        "generate": (128, 2048),
        "document": (2048, 128),
        "research": (2048, 2048),
    }


def test_scaling():
    small = get_workload("generate").scaled(1 / 64)
    assert (small.name, small.input_tokens, small.output_tokens) == ("generate", 2, 32)
    assert (
        get_workload("chat").scaled(0.001).input_tokens,
        get_workload("chat").scaled(0.001).output_tokens,
    ) == (1, 2)
    with pytest.raises(UsageError, match="--scale 0 must be above 0"):
        get_workload("chat").scaled(0)
    with pytest.raises(UsageError, match=r"Unknown profile 'talk'.*chat"):
        get_workload("talk")


def test_prompts_are_exact_repeatable_and_unique():
    tokens = TokenRange(10, 50, "test")
    prompts = [
        make_prompt(tokens, 64, 0, profile, c, i)
        for profile in ("chat", "generate")
        for c in (1, 4)
        for i in range(20)
    ]
    assert all(len(p) == 64 and min(p) >= 10 and max(p) < 50 for p in prompts)
    assert len({tuple(p) for p in prompts}) == len(prompts)
    assert len({tuple(p[:16]) for p in prompts}) == len(prompts)  # no shared first cache block either
    assert make_prompt(tokens, 64, 0, "chat", 1, 0) == prompts[0]
    assert make_prompt(tokens, 64, 1, "chat", 1, 0) != prompts[0]


@pytest.mark.parametrize("size", [16, 100, 256, 32000, 49152, 151936])
def test_the_range_is_inside_the_vocabulary(size):
    tokens = range_within(size, "test")
    assert 0 < tokens.low < tokens.high < size
    assert tokens.high - tokens.low >= size // 2


def test_tiny_vocabulary_is_refused():
    with pytest.raises(UsageError, match="A vocabulary of 4 tokens"):
        range_within(4, "test")


def test_range_of_a_model_folder(tmp_path):
    assert range_of_folder(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 2000}}))
    assert range_of_folder(tmp_path) == TokenRange(500, 1800, "vocab_size in config.json")
    (tmp_path / "config.json").write_text("{")
    assert range_of_folder(tmp_path) is None
    assert UNKNOWN_VOCABULARY.high <= 1000


def test_range_of_a_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({f"w{i}": i for i in range(400)}, unk_token="w0")).save(
        str(tmp_path / "tokenizer.json")
    )
    assert range_of_tokenizer(tmp_path) == TokenRange(100, 360, "the vocabulary of tokenizer.json")
    with pytest.raises(UsageError, match=r"no tokenizer.json could be read"):
        range_of_tokenizer(tmp_path / "nowhere")

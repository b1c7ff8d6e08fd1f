"""The real engine behind the protocol, and transformers' own loss as an independent witness."""

import math

import pytest
import torch

from fourfold.engine import Engine, EngineConfig
from fourfold.evaluate import default_texts, evaluate

WINDOW, COUNT = 64, 6


@pytest.fixture(scope="module")
def engine(tiny_llama) -> Engine:
    return Engine.load(tiny_llama, EngineConfig(dtype="float32", kv_cache_tokens=64, threads=1))


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """The package's texts as plain ASCII, where the tiny tokenizer's token is a byte and a letter."""
    plain = {name: text.encode("ascii", "ignore").decode() for name, text in default_texts().items()}
    return {name: text[: WINDOW * COUNT] for name, text in plain.items()}


def test_perplexity_is_that_of_transformers_loss(engine, tiny_llama, texts):
    from transformers import AutoModelForCausalLM

    witness = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    record = evaluate(engine, None, texts, window_tokens=WINDOW)
    for name, text in texts.items():
        windows = torch.tensor(engine.encode(text)).view(COUNT, WINDOW)
        with torch.no_grad():
            loss = float(witness(input_ids=windows, labels=windows).loss)
        assert record.texts[name].perplexity.value == pytest.approx(math.exp(loss), rel=1e-4)


def test_the_engine_is_no_distance_from_itself(engine, texts):
    record = evaluate(engine, engine, texts, window_tokens=WINDOW)
    for quality in [record.overall, *record.texts.values()]:
        assert quality.kl_divergence is not None and quality.kl_divergence.value == 0
        assert quality.top1_agreement is not None and quality.top1_agreement.value == 1
        assert quality.perplexity == quality.perplexity_base

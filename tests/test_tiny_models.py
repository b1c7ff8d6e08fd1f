"""The tiny models that the other tests stand on are loadable by transformers and round-trip text."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_qwen3"])
def test_tiny_models_load_and_encode(fixture, request):
    folder = request.getfixturevalue(fixture)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Hello, world é", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == "Hello, world é"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert max(ids) < model.config.vocab_size

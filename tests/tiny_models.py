"""Builders of tiny models with real architectures, made on the spot, never downloaded."""

import json
from pathlib import Path

import torch


def tiny_config(model_type: str, **changes) -> dict:
    """A config.json of a few thousand parameters whose shapes are multiples of 32, unless changed."""
    config = {
        "architectures": [
            {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}.get(model_type, model_type)
        ],
        "model_type": model_type,
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "bfloat16",
    }
    return config | changes


def write_tiny_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 256 entries with a chat template: enough for the server and for text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|bos|>", "<|eos|>"]
    # 254 byte symbols and two specials fill the 256 rows; two rare control bytes fall to the unknown token
    vocabulary = {token: i for i, token in enumerate(specials + alphabet[:254])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<|bos|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def build_tiny_model(folder: Path, model_type: str = "llama", seed: int = 0, **changes) -> Path:
    """A random model of ``model_type`` saved by transformers itself, with tokenizer, in bf16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    values = tiny_config(model_type, **changes)
    config = AutoConfig.for_model(**{k: v for k, v in values.items() if k != "architectures"})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    write_tiny_tokenizer(folder)
    return folder

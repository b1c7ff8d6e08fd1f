"""From a GGUF file's metadata to the config.json that transformers would have for the model.

Keys and their meaning are those of the GGUF specification (ggml, docs/gguf.md). What cannot be expressed
without guessing (scaled rotary embeddings, experts) is refused, because a model that is only slightly wrong
is worse.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourfold.checkpoint.storage.header import short
from fourfold.core.errors import FourfoldError

START_AGAIN = "Start from the model's Hugging Face folder instead."


@dataclass(frozen=True)
class Architecture:
    """How a GGUF architecture is called in transformers, and whether its q and k rows were permuted."""

    model_type: str
    class_name: str
    permuted: bool


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", False),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", False),
}
REQUIRED = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
TOKENS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}


def architecture_of(path: Path, metadata: dict[str, Any]) -> Architecture:
    """The model's architecture. Raises FourfoldError, listing the known ones, for any other."""
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise FourfoldError(
            f"{path} holds a model of the architecture '{short(str(name))}'. From GGUF, Fourfold reads "
            f"{', '.join(ARCHITECTURES)}. {START_AGAIN}"
        )
    return ARCHITECTURES[name]


def model_config(path: Path, metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """config.json from ``metadata``; ``shapes`` are those of the GGUF tensors, rows first."""
    architecture = architecture_of(path, metadata)
    prefix = metadata["general.architecture"] + "."
    values = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    _refuse_inexpressible(path, values, shapes)
    config: dict[str, Any] = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    for key, field in REQUIRED.items():
        config[field] = _number(path, prefix + key, values.get(key))
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = values.get("attention.head_count_kv", heads)
    config["head_dim"] = _head_dim(path, prefix, values, config)
    config["vocab_size"] = _vocabulary(path, shapes)
    theta = float(values.get("rope.freq_base", 10000.0))
    config["rope_theta"] = theta
    config["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"}
    if architecture.model_type == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in shapes
        config["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
    return config | token_ids(metadata)


def token_ids(metadata: dict[str, Any]) -> dict[str, int]:
    """bos, eos and pad token ids as far as the file tells them."""
    keys = {f"tokenizer.ggml.{name}_token_id": field for name, field in TOKENS.items()}
    return {field: int(metadata[key]) for key, field in keys.items() if key in metadata}


def _number(path: Path, key: str, value: object) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FourfoldError(f"{path} has no usable '{key}' in its metadata. {START_AGAIN}")
    return value


def _head_dim(path: Path, prefix: str, values: dict[str, Any], config: dict[str, Any]) -> int:
    default = config["hidden_size"] // max(1, config["num_attention_heads"])
    head_dim = values.get("attention.key_length", default)
    if values.get("attention.value_length", head_dim) != head_dim:
        raise FourfoldError(
            f"{path} has keys and values of different width ({prefix}attention). {START_AGAIN}"
        )
    if values.get("rope.dimension_count", head_dim) != head_dim:
        raise FourfoldError(
            f"{path} rotates only part of each head ({prefix}rope.dimension_count). {START_AGAIN}"
        )
    return int(head_dim)


def _vocabulary(path: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    if len(shapes.get("token_embd.weight", ())) != 2:
        raise FourfoldError(f"{path} holds no token_embd.weight. {START_AGAIN}")
    return shapes["token_embd.weight"][0]


def _refuse_inexpressible(path: Path, values: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    scaling = values.get("rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in shapes:
        raise FourfoldError(
            f"{path} scales its rotary embeddings (rope.scaling or rope_freqs), which cannot be taken over "
            f"without guessing. {START_AGAIN}"
        )
    if values.get("expert_count", 0):
        raise FourfoldError(f"{path} has experts, which Fourfold does not read from GGUF. {START_AGAIN}")

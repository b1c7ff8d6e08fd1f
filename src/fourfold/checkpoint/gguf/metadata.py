"""From a GGUF file's metadata to the config.json that transformers would have for the model.

Keys and their meaning are those of the GGUF specification (ggml, docs/gguf.md). What cannot be expressed
without guessing (rotary scaling other than Llama 3's, experts) is refused, because a model that is only
slightly wrong is worse.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fourfold.checkpoint.gguf.rope import TENSOR, llama3_parameters
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
}
EPSILON = "attention.layer_norm_rms_epsilon"
TOKENS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}


def architecture_of(path: Path, metadata: dict[str, Any]) -> Architecture:
    """The model's architecture. Raises FourfoldError, listing the known ones, for any other."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise FourfoldError(
            f"{path} holds a model of the architecture '{short(str(name))}'. From GGUF, Fourfold reads "
            f"{', '.join(ARCHITECTURES)}. {START_AGAIN}"
        )
    return ARCHITECTURES[name]


def model_config(
    path: Path,
    metadata: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    divisors: np.ndarray | None = None,
) -> dict[str, Any]:
    """config.json from ``metadata``; ``shapes`` are those of the GGUF tensors, rows first.

    ``divisors`` is the tensor ``rope_freqs.weight`` where there is one. Raises FourfoldError for values that
    no model can have, and for what cannot be expressed.
    """
    architecture = architecture_of(path, metadata)
    prefix = metadata["general.architecture"] + "."
    values = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    _refuse_inexpressible(path, values)
    config: dict[str, Any] = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    for key, field in REQUIRED.items():
        config[field] = _count(path, prefix + key, values.get(key))
    if config["num_hidden_layers"] > len(shapes):
        raise _unusable(path, prefix + "block_count", config["num_hidden_layers"])
    config["rms_norm_eps"] = _positive(path, prefix + EPSILON, values.get(EPSILON))
    config["num_key_value_heads"] = _kv_heads(path, prefix, values, config["num_attention_heads"])
    config["head_dim"] = _head_dim(path, prefix, values, config)
    config["vocab_size"] = _vocabulary(path, shapes)
    theta = _positive(path, prefix + "rope.freq_base", values.get("rope.freq_base", 10000.0))
    config["rope_theta"] = theta
    config["rope_parameters"] = _rope(path, theta, config["head_dim"], divisors)
    if architecture.model_type == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in shapes
        config["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
    return config | token_ids(metadata)


def token_ids(metadata: dict[str, Any]) -> dict[str, int]:
    """bos, eos and pad token ids as far as the file tells them."""
    keys = {f"tokenizer.ggml.{name}_token_id": field for name, field in TOKENS.items()}
    return {field: metadata[key] for key, field in keys.items() if type(metadata.get(key)) is int}


def _count(path: Path, key: str, value: object) -> int:
    # bool is an int in Python
    if type(value) is not int or value < 1:
        raise _unusable(path, key, value)
    return value


def _positive(path: Path, key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise _unusable(path, key, value)
    return float(value)


def _unusable(path: Path, key: str, value: object) -> FourfoldError:
    return FourfoldError(
        f"{path} has no usable '{key}' in its metadata: {short(repr(value))}. It is damaged, or of a kind "
        f"that Fourfold does not read. {START_AGAIN}"
    )


def _kv_heads(path: Path, prefix: str, values: dict[str, Any], heads: int) -> int:
    key = "attention.head_count_kv"
    count = _count(path, prefix + key, values.get(key, heads))
    if heads % count:
        raise _unusable(path, prefix + key, count)
    return count


def _rope(path: Path, theta: float, head_dim: int, divisors: np.ndarray | None) -> dict[str, Any]:
    if divisors is None:
        return {"rope_theta": theta, "rope_type": "default"}
    parameters = llama3_parameters(divisors, theta) if divisors.shape == (head_dim // 2,) else None
    if parameters is None:
        raise FourfoldError(
            f"{path} scales its rotary embeddings ({TENSOR}) in another way than Llama 3.1 does, which "
            f"cannot be taken over without guessing. {START_AGAIN}"
        )
    return parameters


def _head_dim(path: Path, prefix: str, values: dict[str, Any], config: dict[str, Any]) -> int:
    default = config["hidden_size"] // config["num_attention_heads"]
    key = "attention.key_length"
    head_dim = _count(path, prefix + key, values.get(key, default))
    if values.get("attention.value_length", head_dim) != head_dim:
        raise FourfoldError(
            f"{path} has keys and values of different width ({prefix}attention). {START_AGAIN}"
        )
    if values.get("rope.dimension_count", head_dim) != head_dim:
        raise FourfoldError(
            f"{path} rotates only part of each head ({prefix}rope.dimension_count). {START_AGAIN}"
        )
    return head_dim


def _vocabulary(path: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    if len(shapes.get("token_embd.weight", ())) != 2:
        raise FourfoldError(f"{path} holds no token_embd.weight. {START_AGAIN}")
    return shapes["token_embd.weight"][0]


def _refuse_inexpressible(path: Path, values: dict[str, Any]) -> None:
    if values.get("rope.scaling.type", "none") != "none":
        raise FourfoldError(
            f"{path} scales its rotary embeddings (rope.scaling), which cannot be taken over without "
            f"guessing. {START_AGAIN}"
        )
    if values.get("expert_count", 0):
        raise FourfoldError(f"{path} has experts, which Fourfold does not read from GGUF. {START_AGAIN}")

"""From a GGUF file's metadata to the config.json that transformers would have for the model.

Keys and their meaning are those of the GGUF specification (ggml, docs/gguf.md). What cannot be expressed
without guessing (rotary scaling other than Llama 3's) is refused, because a model that is only
slightly wrong is worse.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fourfold.checkpoint.gguf.experts import MIXTRAL, QWEN, ExpertNames, expert_settings
from fourfold.checkpoint.gguf.gemma import NORM_OFFSET, gemma3_settings
from fourfold.checkpoint.gguf.rope import TENSOR, llama3_parameters
from fourfold.checkpoint.gguf.values import START_AGAIN, Values
from fourfold.checkpoint.storage.header import short
from fourfold.core.errors import FourfoldError


@dataclass(frozen=True)
class Architecture:
    """How a GGUF architecture is called in transformers, whether its q and k rows were permuted, what was
    added to the weights of its norms, and the names of its experts.
    """

    model_type: str
    class_name: str
    permuted: bool = False
    norm_offset: float = 0.0
    experts: ExpertNames | None = None


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", permuted=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": Architecture("qwen3_moe", "Qwen3MoeForCausalLM", experts=QWEN),
    "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM", norm_offset=NORM_OFFSET),
}
WITH_EXPERTS = {  # of those whose files may have some
    "llama": Architecture("mixtral", "MixtralForCausalLM", permuted=True, experts=MIXTRAL)
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
    has_experts = bool(metadata.get(f"{name}.expert_count", 0))
    return WITH_EXPERTS.get(name, ARCHITECTURES[name]) if has_experts else ARCHITECTURES[name]


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
    values = Values(path, metadata["general.architecture"], metadata)
    _refuse_inexpressible(values, architecture)
    config: dict[str, Any] = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "dtype": "bfloat16",
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    config |= _sizes(path, values, shapes)
    if architecture.model_type == "gemma3_text":
        return config | gemma3_settings(config, values) | token_ids(metadata)
    theta = values.positive("rope.freq_base", 10000.0)
    config |= {"hidden_act": "silu", "rope_theta": theta}
    config["rope_parameters"] = _rope(path, theta, config["head_dim"], divisors)
    if architecture.experts:
        config |= expert_settings(architecture.experts, values, config["intermediate_size"])
    if architecture.model_type == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in shapes
        config["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
    return config | token_ids(metadata)


def token_ids(metadata: dict[str, Any]) -> dict[str, int]:
    """bos, eos and pad token ids as far as the file tells them."""
    keys = {f"tokenizer.ggml.{name}_token_id": field for name, field in TOKENS.items()}
    return {field: metadata[key] for key, field in keys.items() if type(metadata.get(key)) is int}


def _sizes(path: Path, values: Values, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """What every architecture has."""
    sizes: dict[str, Any] = {field: values.count(key) for key, field in REQUIRED.items()}
    if sizes["num_hidden_layers"] > len(shapes):
        raise values.unusable("block_count", sizes["num_hidden_layers"])
    sizes["rms_norm_eps"] = values.positive(EPSILON)
    sizes["num_key_value_heads"] = _kv_heads(values, sizes["num_attention_heads"])
    sizes["head_dim"] = _head_dim(values, sizes)
    sizes["vocab_size"] = _vocabulary(path, shapes)
    return sizes


def _kv_heads(values: Values, heads: int) -> int:
    key = "attention.head_count_kv"
    count = values.count(key, heads)
    if heads % count:
        raise values.unusable(key, count)
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


def _head_dim(values: Values, sizes: dict[str, Any]) -> int:
    head_dim = values.count("attention.key_length", sizes["hidden_size"] // sizes["num_attention_heads"])
    if values.get("attention.value_length", head_dim) != head_dim:
        raise values.inexpressible("attention", "has keys and values of different width")
    if values.get("rope.dimension_count", head_dim) != head_dim:
        raise values.inexpressible("rope.dimension_count", "rotates only part of each head")
    return head_dim


def _vocabulary(path: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    if len(shapes.get("token_embd.weight", ())) != 2:
        raise FourfoldError(f"{path} holds no token_embd.weight. {START_AGAIN}")
    return shapes["token_embd.weight"][0]


def _refuse_inexpressible(values: Values, architecture: Architecture) -> None:
    known = ("none", "linear") if architecture.model_type == "gemma3_text" else ("none",)
    if values.get("rope.scaling.type", "none") not in known:
        raise values.inexpressible(
            "rope.scaling",
            "scales its rotary embeddings in a way which cannot be taken over without guessing",
        )
    if values.get("expert_count", 0) and architecture.experts is None:
        raise values.inexpressible(
            "expert_count", f"has experts, which a {architecture.class_name} does not have"
        )

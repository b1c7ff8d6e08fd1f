"""From a checkpoint to a model in memory: its architecture's class, its dtype, the room for its cache."""

from typing import Any

import torch

from fourfold.checkpoint import Checkpoint
from fourfold.core.errors import FourfoldError, UsageError
from fourfold.core.registry import Registry
from fourfold.engine.decoder import Decoder, Shape
from fourfold.engine.kv_format import KVFormat
from fourfold.engine.requests import EngineConfig

ARCHITECTURES = Registry("fourfold.engine.models", "MODEL", "architecture")
DEFAULT_KV_BYTES = 1 << 30
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def find_architecture(checkpoint: Checkpoint) -> type[Decoder]:
    """The class of the checkpoint's model. Raises UsageError naming the architectures there are.

    Reads no weights; a config that the class cannot follow is a FourfoldError here already.
    """
    name = str(checkpoint.config.get("model_type")).replace("_", "-")
    if name not in ARCHITECTURES.names():
        raise UsageError(
            f"{checkpoint.source} is a '{checkpoint.config.get('model_type')}' model; the engine knows: "
            f"{', '.join(ARCHITECTURES.names())}. Quantizing and converting work without the engine."
        )
    architecture: type[Decoder] = ARCHITECTURES.get(name)
    architecture.check(checkpoint.config)
    return architecture


def choose_dtype(model: dict[str, Any], config: EngineConfig) -> torch.dtype:
    """What the configuration asks for; auto is the checkpoint's own, float16 held exactly in float32."""
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    own = str(model.get("dtype") or model.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    return torch.bfloat16 if own == "bfloat16" else torch.float32


def build_kv_format(checkpoint: Checkpoint, model: Decoder) -> KVFormat:
    """The cache format of the checkpoint's scheme with its scales, if it has any."""
    scales = None
    if checkpoint.kv_scales:
        names = [
            [f"model.layers.{i}.self_attn.{part}" for part in ("k_proj", "v_proj")]
            for i in range(model.shape.layers)
        ]
        scales = torch.tensor([[checkpoint.kv_scales.get(name, 1.0) for name in row] for row in names])
    return KVFormat(checkpoint.quantization.kv_cache, model.dtype, model.shape.kv_heads, scales)


def kv_block_count(config: EngineConfig, shape: Shape, form: KVFormat) -> int:
    """Blocks of the KV cache, the spare zero block included. Raises FourfoldError when it is too small."""
    token_bytes = shape.layers * 2 * shape.kv_heads * shape.head_dim * form.stored_dtype.itemsize
    tokens = config.kv_cache_tokens
    if tokens is None:
        tokens = min(config.max_batch_size * shape.max_positions, DEFAULT_KV_BYTES // token_bytes)
    blocks = tokens // config.kv_block_size
    if blocks < 1:
        raise FourfoldError(
            f"A KV cache of {tokens} tokens is smaller than one block of {config.kv_block_size}. Raise "
            "kv_cache_tokens."
        )
    return blocks + 1

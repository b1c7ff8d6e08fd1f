"""From a checkpoint to a model in memory: its architecture's class, its dtype, the room for its cache."""

from typing import Any

import torch

from fourfold.checkpoint import Checkpoint
from fourfold.checkpoint.kv_scales import PER_HEAD, SCALED, scale_problem
from fourfold.core.errors import FourfoldError, UsageError
from fourfold.core.quantization import KVCacheFormat
from fourfold.core.registry import Registry
from fourfold.engine.decoder import Decoder
from fourfold.engine.kv_format import KVFormat, kv_format
from fourfold.engine.requests import EngineConfig
from fourfold.engine.shape import Shape

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
    """What the configuration asks for; auto is bfloat16, or float32 where ``exact`` needs it."""
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    own = own_dtype(model)
    return torch.float32 if own != "bfloat16" and config.arithmetic == "exact" else torch.bfloat16


def own_dtype(model: dict[str, Any]) -> str:
    """The checkpoint's, by its config."""
    return str(model.get("dtype") or model.get("torch_dtype") or "bfloat16").removeprefix("torch.")


def input_parts(model: dict[str, Any], config: EngineConfig) -> int:
    """As how many bfloat16s torch's path takes inputs: two have more bits than a float16 checkpoint means."""
    return 2 if config.dtype == "auto" and own_dtype(model) == "float16" else 3


def build_kv_format(checkpoint: Checkpoint, config: EngineConfig, model: Decoder) -> KVFormat:
    """The cache format that the configuration asks for, or the checkpoint's, with the scales stored there.

    Raises UsageError for ``fp8-head`` without scales of heads, FourfoldError for scales that are no numbers.
    """
    stored = checkpoint.quantization.kv_cache
    name = stored if config.kv_cache == "auto" else None if config.kv_cache == "none" else config.kv_cache
    if name == PER_HEAD and stored != PER_HEAD:
        raise UsageError(
            f"A KV cache in {PER_HEAD} lives by calibrated scales, and {checkpoint.source} stores none. "
            f"Quantize with a recipe of kv_cache: {PER_HEAD}, or choose --kv-cache fp8 or mxfp8-e4m3."
        )
    scales = None
    if name in SCALED and checkpoint.kv_scales:
        scales = torch.stack([_layer_scales(checkpoint, name, model, i) for i in range(model.shape.layers)])
    return kv_format(name, model.dtype, model.shape.head_dim, scales)


def _layer_scales(checkpoint: Checkpoint, name: KVCacheFormat, model: Decoder, layer: int) -> torch.Tensor:
    """Scales [2 * kv_heads] of ``layer``, keys' first."""
    parts = []
    for part in ("k_proj", "v_proj"):
        module = f"{model.prefix}layers.{layer}.self_attn.{part}"
        scale = checkpoint.kv_scales.get(module, torch.ones(1))
        heads = model.shape.kv_heads
        count = heads if scale.numel() > 1 else 1
        if problem := scale_problem(scale, count):
            raise FourfoldError(
                f"The KV scale of {module} {problem}. `fourfold verify` lists what is damaged."
            )
        # for one scale, the largest head's holds every head
        parts.append((scale if name == PER_HEAD else scale.max()).expand(heads))
    return torch.cat(parts)


def kv_block_count(config: EngineConfig, shape: Shape, form: KVFormat) -> int:
    """Blocks of the KV cache, the spare zero block included. Raises FourfoldError when it is too small."""
    token_bytes = shape.layers * 2 * shape.kv_heads * form.head_bytes
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

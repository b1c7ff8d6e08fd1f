"""Checkpoints with a calibrated KV cache, for the tests of the rooms that make and read them."""

from collections.abc import Mapping
from pathlib import Path

import torch

from fourfold.checkpoint import CheckpointWriter, open_checkpoint
from fourfold.checkpoint.convert import copy_shards
from fourfold.core.quantization import Quantization


def with_kv_cache(source: Path, out: Path, form: str, scales: Mapping[str, torch.Tensor]) -> Path:
    """``source`` again, its weights as they are, with a calibrated KV cache."""
    checkpoint = open_checkpoint(source)
    writer = CheckpointWriter(
        out,
        "compressed-tensors",
        checkpoint.config,
        Quantization.model_validate({"kv_cache": form}),
        [checkpoint.info(name) for name in checkpoint.names()],
        fingerprint={},
        kv_scales=scales,
    )
    copy_shards(checkpoint, writer)
    writer.finish(source=str(source), write_tokenizer=checkpoint.write_tokenizer)
    return out

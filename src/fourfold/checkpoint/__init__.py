"""Checkpoints in and out: safetensors folders in several dialects, GGUF files, hub names."""

from fourfold.checkpoint.checkpoint import Checkpoint
from fourfold.checkpoint.dialect import dialect_names
from fourfold.checkpoint.plan import Shard
from fourfold.checkpoint.sources import open_checkpoint
from fourfold.checkpoint.tensors import TensorInfo
from fourfold.checkpoint.writer import CheckpointWriter

__all__ = ["Checkpoint", "CheckpointWriter", "Shard", "TensorInfo", "dialect_names", "open_checkpoint"]

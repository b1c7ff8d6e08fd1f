"""Tiny checkpoints that the tests of this room share."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import build_tiny_model

MOE = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    # hidden = intermediate, as in the real one: the square down_proj does not tell its orientation
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64},
}


def build_moe(folder: Path, model_type: str, **changes) -> Path:
    """A random MoE of one layer as ``save_pretrained`` writes it: the layout of the hub."""
    return build_tiny_model(folder, model_type, **({"num_hidden_layers": 1} | MOE[model_type] | changes))


def fuse_as_transformers(source: Path, out: Path) -> Path:
    """``source`` in the layout that transformers 5 holds in memory: all experts of a layer in one tensor."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(out, save_original_format=False)
    for file in source.glob("token*"):
        (out / file.name).write_bytes(file.read_bytes())
    return out


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor of every shard."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def tensor_bytes(folder: Path) -> int:
    """Bytes of all stored tensors, as the safetensors library counts them."""
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            total += sum(handle.get_tensor(key).nbytes for key in handle.keys())  # noqa: SIM118
    return total


def change_tensor(folder: Path, name: str, change) -> None:
    """Replace one tensor of a single-file checkpoint by ``change(tensor)``."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})

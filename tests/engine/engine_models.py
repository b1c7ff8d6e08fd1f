"""Models, engines and transformers' answers that several of this room's tests compare."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build_architecture, build_gemma3

from fourfold.checkpoint import open_checkpoint
from fourfold.compress.experts import parse_fused, unfuse
from fourfold.engine import Engine, EngineConfig, Request, SamplingParams, TokenOutput
from fourfold.formats import BlockTensor

torch.set_num_threads(1)  # tiny work: more threads only wait for each other

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 10000.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
OLD_GEMMA = {  # as Gemma's own files say it
    "rope_parameters": None, "layer_types": None, "rope_theta": 1e5, "rope_local_base_freq": 1e3,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 2,
    "num_attention_heads": None, "rms_norm_eps": None, "head_dim": None,
}  # fmt: skip
TWO_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
}
WINDOW = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}

# By model type: what is changed in the config, and under "config.json" what is rewritten in the file, None
# being taken out. Sequences of the tests are longer than every window here.
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "plain": {},
        "tied": {"tie_word_embeddings": True},
        "biases": {"attention_bias": True, "mlp_bias": True},
        "one-key-head": {"num_key_value_heads": 1},
        "every-head-its-key": {"num_key_value_heads": 4},
        "rope-llama3": {"rope_parameters": LLAMA3},
        "rope-linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}},
        "rope-yarn": {"rope_parameters": YARN},
        "rope-yarn-mscale": {
            "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False}
        },
    },
    "mistral": {
        "whole": {"sliding_window": None},
        "window": {"sliding_window": 20},
        "window-of-one-block": {"sliding_window": 8},
    },
    "qwen2": {"plain": {}, "one-key-head": {"num_key_value_heads": 1}, "window": WINDOW},
    "qwen3": {
        "plain": {},
        "tied": {"tie_word_embeddings": True},
        "window": WINDOW | {"attention_bias": True},
    },
    "qwen3_moe": {
        "plain": {},
        "fused": {"fused": True},
        "shares-among-chosen": {"norm_topk_prob": True, "num_experts": 6, "num_experts_per_tok": 3},
        "one-dense-layer": {"mlp_only_layers": [0], "num_experts_per_tok": 1},
        "every-second-layer-and-window": {"decoder_sparse_step": 2} | WINDOW,
    },
    "mixtral": {
        "window": {},
        "whole-and-tied": {"sliding_window": None, "tie_word_embeddings": True},
        "fused": {"fused": True},
    },
    "gpt_oss": {
        "plain": {"attention_bias": True},
        "yarn-within-reach": {"rope_parameters": YARN | {"truncate": False}, "num_key_value_heads": 1},
        "narrow-gate": {"swiglu_limit": 0.5, "swiglu_alpha": 1.1},
        "as-released": {
            "num_hidden_layers": 3,
            "layer_types": None,
            "config.json": {"layer_types": None, "rope_parameters": None, "swiglu_limit": None},
        },
    },
    "gemma2": {"plain": {}, "uncapped": {"attn_logit_softcapping": None, "final_logit_softcapping": None}},
    "gemma3_text": {
        "two-ropes": {"rope_parameters": TWO_ROPES, "query_pre_attn_scalar": 17},
        "capped": {"final_logit_softcapping": 2.0, "sliding_window": 20},
        "as-released": {
            "num_hidden_layers": 4,
            "layer_types": None,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "rms_norm_eps": 1e-6,
            "config.json": OLD_GEMMA,
        },
    },
    "gemma3": {"plain": {"rope_parameters": TWO_ROPES}},
}


def build_case(folder: Path, model_type: str, case: str) -> Path:
    """The model of one of CASES."""
    changes = dict(CASES[model_type][case])
    rewritten, fused = changes.pop("config.json", {}), changes.pop("fused", False)
    if model_type == "gemma3":
        build_gemma3(folder, **changes)
    else:
        build_architecture(folder, model_type, **changes)
    if fused:  # as transformers holds it, and can be told to write it
        witness(folder, torch.bfloat16).save_pretrained(folder, save_original_format=False)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | rewritten
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def load(folder: Path, **config: Any) -> Engine:
    """A one-thread engine of float32 for 16 sequences unless told otherwise."""
    settings = {"dtype": "float32", "threads": 1, "max_batch_size": 16} | config
    return Engine.load(folder, EngineConfig(**settings))


def witness(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The same model in transformers, the independent implementation."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def witness_logits(model: Any, token_ids: list[int]) -> np.ndarray:
    """Transformers' logits [T, V] for one sequence."""
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0].float().numpy()


def values_witness(source: Path, packed: Path, out: Path) -> Any:
    """Transformers' model of ``source`` with ``packed``'s values."""
    shutil.copytree(source, out)
    config = json.loads((source / "config.json").read_text())
    held = {name: value for file in source.glob("*.safetensors") for name, value in load_file(file).items()}
    held = {name: value.float() for name, value in held.items()}
    shapes = {name: tuple(value.shape) for name, value in held.items()}
    fused = {
        piece.name: (name, piece)
        for name, shape in shapes.items()
        if parse_fused(name, shape)
        for piece in unfuse(name, shapes, config)
    }
    checkpoint = open_checkpoint(packed)
    for name in checkpoint.names():
        value = checkpoint.load(name)
        value = value.dequantize() if isinstance(value, BlockTensor) else value.float()
        if name in held:
            held[name] = value
        else:
            whole, piece = fused[name]
            piece.put(held[whole], value)
    for file in out.glob("*.safetensors"):
        save_file({name: held[name] for name in load_file(file)}, file, metadata={"format": "pt"})
    return witness(out)


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random ordinary tokens."""
    return np.random.default_rng(seed).integers(2, 256, length).tolist()


def greedy(max_tokens: int | None, **others: Any) -> SamplingParams:
    """Greedy to the full length, so that runs can be compared token for token."""
    return SamplingParams(**({"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True} | others))


def drain(engine: Engine, limit: int = 5000) -> list[TokenOutput]:
    """Step until nothing is left."""
    outputs = []
    while engine.has_work:
        outputs += engine.step()
        limit -= 1
        assert limit, "the engine does not come to an end"
    return outputs


def continue_all(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    """Tokens that follow each prompt when all run together."""
    return [done.token_ids for done in engine.generate(list(prompts), params)]


__all__ = ["Request"]

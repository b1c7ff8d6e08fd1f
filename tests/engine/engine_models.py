"""Models, engines and transformers' answers that several of this room's tests compare."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fourfold.engine import Engine, EngineConfig, Request, SamplingParams, TokenOutput

torch.set_num_threads(1)  # tiny work: more threads only wait for each other


def load(folder: Path, **config: Any) -> Engine:
    """A one-thread engine of float32 unless told otherwise."""
    return Engine.load(folder, EngineConfig(**({"dtype": "float32", "threads": 1} | config)))


def witness(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The same model in transformers, the independent implementation."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def witness_logits(model: Any, token_ids: list[int]) -> np.ndarray:
    """Transformers' logits [T, V] for one sequence."""
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0].float().numpy()


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

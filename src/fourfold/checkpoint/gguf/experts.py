"""Experts in GGUF: one tensor [E, out, in] for each projection of a layer, here cut into the experts' own.

llama.cpp brings the shares of a token's chosen experts to a sum of 1, in Qwen3-MoE as in Mixtral.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from fourfold.checkpoint.gguf.header import Stored
from fourfold.checkpoint.gguf.values import Values

STACK = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight")


@dataclass(frozen=True)
class ExpertNames:
    """What transformers calls a layer's router and experts, and what its config calls their sizes."""

    router: str
    module: str
    projections: dict[str, str]
    count: str
    width: str


QWEN = ExpertNames(
    "mlp.gate",
    "mlp.experts",
    {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    "num_experts",
    "moe_intermediate_size",
)
MIXTRAL = ExpertNames(
    "block_sparse_moe.gate",
    "block_sparse_moe.experts",
    {"gate": "w1", "up": "w3", "down": "w2"},
    "num_local_experts",
    "intermediate_size",
)


def expert_settings(names: ExpertNames, values: Values, intermediate: int) -> dict[str, Any]:
    """What config.json says of experts; as wide as ``intermediate`` where the file says nothing else."""
    return {
        names.count: values.count("expert_count"),
        "num_experts_per_tok": values.count("expert_used_count"),
        names.width: values.count("expert_feed_forward_length", intermediate),
        "norm_topk_prob": True,
    }


def cut(stored: Stored, names: ExpertNames, count: int) -> Iterator[tuple[str, Stored]]:
    """The matrices in ``stored`` by parameter name; none unless it is a stack of ``count`` experts."""
    place = STACK.fullmatch(stored.name)
    if place is None or len(stored.shape) != 3 or stored.shape[0] != count:
        return
    layer, projection = place[1], names.projections[place[2]]
    nbytes = stored.nbytes // count
    for expert in range(count):
        name = f"model.layers.{layer}.{names.module}.{expert}.{projection}.weight"
        begin = stored.begin + expert * nbytes
        yield name, replace(stored, shape=stored.shape[1:], begin=begin, nbytes=nbytes)

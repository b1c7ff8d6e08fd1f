"""Which tensors are weights of linear layers: decided from names and shapes, without building the model.

A linear weight is a 2-D ``*.weight`` [out, in] inside a numbered decoder layer. Embeddings look the same and
are told by name; they are never candidates. Names of norms, routers, output heads and vision or audio towers
follow the checkpoints on the hub; the price of not building the model is that a new architecture with a new
name for its router has its router rounded until a recipe names it in ``keep``. ``--dry-run`` lists every
decision.
"""

import re
from typing import Any

from fourfold.checkpoint.dialect import EMBEDDING, TOWER, module_of
from fourfold.compress.recipe import Recipe, first_match
from fourfold.core.errors import FourfoldError

LAYER = re.compile(r"(^|\.)(layers|layer|h|blocks|block)\.\d+\.")
NORM = re.compile(r"norm\d?$|^ln_\w+$")
CONVOLUTION = re.compile(r"conv")
ROUTER_PARTS = frozenset({"router", "gate", "gating"})
ROUTER_NAMES = frozenset({"wg", "shared_expert_gate", "router_gate"})
SMALLEST_LINEAR = 32

# transformers' Conv1D: weights stored [in, out], so that the last dimension is not the input
STORED_TRANSPOSED = {
    "gpt2": {"c_attn", "c_proj", "c_fc", "q_attn"},
    "openai-gpt": {"c_attn", "c_proj", "c_fc"},
    "decision_transformer": {"c_attn", "c_proj", "c_fc", "q_attn"},
    "imagegpt": {"c_attn", "c_proj", "c_fc", "q_attn"},
}


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a configuration."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def not_linear(name: str, shape: tuple[int, ...]) -> str | None:
    """Why ``name`` cannot be a linear weight at all, or None when it can."""
    parts = name.split(".")
    if parts[-1] != "weight":
        return "not a weight"
    if len(shape) == 1:
        return "1-D"
    if len(shape) != 2:
        return "convolution" if CONVOLUTION.search(name) else f"{len(shape)}-D"
    return "embedding" if EMBEDDING.search(name) else None


def kept_reason(name: str, recipe: Recipe) -> str | None:
    """Why ``recipe`` keeps the linear weight ``name``, or None when a rule rounds it."""
    module = module_of(name)
    if pattern := first_match(recipe.keep, module):
        return f"keep: {pattern}"
    if recipe.keep_default and (reason := default_reason(module)):
        return reason
    rule = recipe.rule_for(module)
    if rule is None:
        return "no rule matches"
    return "a rule keeps it" if rule.weight is None else None


def default_reason(module: str) -> str | None:
    """Why ``module`` is kept by default, or None."""
    parts = module.split(".")
    if any(TOWER.search(part) for part in parts):
        return "vision or audio tower"
    if not LAYER.search(module):
        return "outside the decoder layers"
    if parts[-1] in ROUTER_NAMES or not ROUTER_PARTS.isdisjoint(parts):
        return "router"
    return "norm" if NORM.search(parts[-1]) else None


def looks_stacked(name: str, shape: tuple[int, ...]) -> bool:
    """Whether an unknown tensor may be several linear layers in one, so that keeping it would be a loss."""
    if CONVOLUTION.search(name) or default_reason(module_of(name)):
        return False
    if "experts" in name.split(".") and len(shape) >= 2:
        return not re.search(r"\.experts\.\d+\.", name)
    return len(shape) == 3 and min(shape[1:]) >= SMALLEST_LINEAR


def check_orientation(name: str, config: dict[str, Any]) -> None:
    """Raise FourfoldError for a weight that its architecture stores as [in, out]."""
    model_type = str(text_config(config).get("model_type"))
    if module_of(name).rpartition(".")[2] in STORED_TRANSPOSED.get(model_type, ()):
        raise FourfoldError(
            f"{name} is stored as [in, out], as {model_type} does, so blocks along its last dimension would "
            "not run along its input. Fourfold does not quantize such layers; add a `keep` entry "
            f"'{module_of(name)}'."
        )

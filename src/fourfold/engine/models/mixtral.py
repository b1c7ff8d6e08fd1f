"""Mixtral: a Mistral with experts in place of its MLPs, under names of its own."""

from dataclasses import replace
from typing import Any

from fourfold.engine.experts import Experts, MixtureOfExperts, build_experts
from fourfold.engine.models.mistral import Mistral
from fourfold.engine.shape import ExpertShape
from fourfold.engine.weights import Weights

RELEASED = {
    "router": "block_sparse_moe.gate",
    "module": "block_sparse_moe.experts",
    "projections": ("w1", "w3", "w2"),
}


class Mixtral(Mistral):
    """``model_type: mixtral``."""

    defaults = {"sliding_window": None, "rope_theta": 1e6}

    @classmethod
    def experts(cls, config: dict[str, Any], layer: int) -> Experts:
        """In every layer, each as wide as ``intermediate_size``."""
        return Experts(ExpertShape.of(config, "intermediate_size"), cls.gating(config))

    def build_mlp(self, weights: Weights, prefix: str, index: int) -> MixtureOfExperts:
        """As released, under Mixtral's own names; as transformers 5 can write it, under everybody's."""
        said = self.experts(self.config, index)
        if weights.has(f"{prefix}{RELEASED['router']}.weight"):
            said = replace(said, **RELEASED)
        return build_experts(weights, prefix, self.shape.hidden, said)


MODEL = Mixtral

"""Mixtral: a Mistral with experts in place of its MLPs, under names of its own."""

from typing import Any

from fourfold.engine.experts import Experts
from fourfold.engine.models.mistral import Mistral
from fourfold.engine.shape import ExpertShape


class Mixtral(Mistral):
    """``model_type: mixtral``."""

    defaults = {"sliding_window": None, "rope_theta": 1e6}

    @classmethod
    def experts(cls, config: dict[str, Any], layer: int) -> Experts:
        """In every layer, each as wide as ``intermediate_size``."""
        return Experts(
            ExpertShape.of(config, "intermediate_size"),
            cls.gating(config),
            router="block_sparse_moe.gate",
            module="block_sparse_moe.experts",
            projections=("w1", "w3", "w2"),
        )


MODEL = Mixtral

"""Qwen3-MoE: a Qwen3 with many small experts in most or all of its layers."""

from typing import Any

from fourfold.engine.experts import Experts
from fourfold.engine.models.qwen3 import Qwen3
from fourfold.engine.shape import ExpertShape


class Qwen3Moe(Qwen3):
    """``model_type: qwen3_moe``. Its window, where it has one, is in every layer."""

    defaults = Qwen3.defaults | {"num_experts": 128, "decoder_sparse_step": 1, "norm_topk_prob": False}

    @classmethod
    def window(cls, config: dict[str, Any], layer: int) -> int | None:
        """``sliding_window`` where ``use_sliding_window`` is on."""
        return config.get("sliding_window") if config.get("use_sliding_window") else None

    @classmethod
    def experts(cls, config: dict[str, Any], layer: int) -> Experts | None:
        """In every ``decoder_sparse_step``-th layer that is not among ``mlp_only_layers``."""
        if layer in (config.get("mlp_only_layers") or []) or (layer + 1) % config["decoder_sparse_step"]:
            return None
        shape = ExpertShape.of(config, "moe_intermediate_size")
        return Experts(shape, cls.gating(config), among_chosen=bool(config["norm_topk_prob"]))


MODEL = Qwen3Moe

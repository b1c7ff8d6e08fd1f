"""Gemma 3, text only: a Gemma 2 with normed heads, two rotary speeds, and no capped scores."""

from dataclasses import replace
from typing import Any

from fourfold.core.errors import FourfoldError
from fourfold.engine.attention import Scoring
from fourfold.engine.decoder import slides
from fourfold.engine.models.gemma2 import Gemma2

FULL, SLIDING = "full_attention", "sliding_attention"


class Gemma3Text(Gemma2):
    """``model_type: gemma3_text``. Five layers in six slide, unless the config says otherwise.

    A config may leave out what is as in transformers: the smallest of those in Gemma 3's own files does.
    """

    defaults = Gemma2.defaults | {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "sliding_window_pattern": 6,
        "final_logit_softcapping": None,
    }
    norms_heads = True

    @classmethod
    def check(cls, config: dict[str, Any]) -> None:
        """As for others; attention that looks ahead, which is for embedding, is refused."""
        super().check(config)
        if cls.settings(config).get("use_bidirectional_attention"):
            raise FourfoldError(
                "config.json asks for use_bidirectional_attention; a model that looks ahead makes embeddings "
                "and no text, and the engine only makes text. Use a generating model."
            )

    @classmethod
    def slides(cls, config: dict[str, Any], layer: int) -> bool:
        """As ``layer_types`` says, or else all but each last of ``sliding_window_pattern``."""
        return slides(config, layer, (layer + 1) % config["sliding_window_pattern"] != 0)

    @classmethod
    def scoring(cls, config: dict[str, Any], layer: int) -> Scoring:
        """Never capped: transformers reads ``attn_logit_softcapping`` and does not use it."""
        return replace(super().scoring(config, layer), softcap=None)

    @classmethod
    def ropes(cls, config: dict[str, Any]) -> list[dict[str, Any]]:
        """Of the layers that see all, which ``rope_scaling`` is for, and of those that slide."""
        old = {
            FULL: {"rope_theta": config.get("rope_theta", 1e6)} | (config.get("rope_scaling") or {}),
            SLIDING: {"rope_theta": config.get("rope_local_base_freq", 1e4)},
        }
        given = config.get("rope_parameters") or {}
        context = {"max_position_embeddings": config["max_position_embeddings"]}
        return [
            context | {"rope_parameters": old[kind] | (given.get(kind) or {})} for kind in (FULL, SLIDING)
        ]

    @classmethod
    def rotary_of(cls, config: dict[str, Any], layer: int) -> int:
        """The second where the layer slides."""
        return int(cls.slides(config, layer))


MODEL = Gemma3Text

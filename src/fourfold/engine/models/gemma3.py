"""Gemma 3 with a vision tower, which is not read: the decoder inside is a gemma3_text."""

from typing import Any

from fourfold.engine.models.gemma3_text import Gemma3Text
from fourfold.engine.weights import Weights

PREFIXES = ("model.language_model.", "language_model.model.")  # as transformers 5 writes them, and as before


class Gemma3(Gemma3Text):
    """``model_type: gemma3``, whose ``text_config`` is a gemma3_text."""

    @classmethod
    def settings(cls, config: dict[str, Any]) -> dict[str, Any]:
        """``text_config``; whether the head is tied is said beside it."""
        tied = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
        return super().settings(tied | config.get("text_config", config))

    def prefix_in(self, weights: Weights) -> str:
        """Where the text's decoder is among the parts."""
        return next((prefix for prefix in PREFIXES if weights.has(prefix + "norm.weight")), PREFIXES[0])


MODEL = Gemma3

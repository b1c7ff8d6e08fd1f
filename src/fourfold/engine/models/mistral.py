"""Mistral: a Llama without biases, whose first release saw 4096 tokens back in every layer."""

from typing import Any

from fourfold.engine.decoder import Decoder


class Mistral(Decoder):
    """``model_type: mistral``. A config that does not speak of its window has 4096, as in transformers."""

    defaults = {"sliding_window": 4096}

    @classmethod
    def window(cls, config: dict[str, Any], layer: int) -> int | None:
        """``sliding_window``, in every layer."""
        return config.get("sliding_window")


MODEL = Mistral

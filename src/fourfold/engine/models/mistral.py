"""Mistral: a Llama without biases, whose first release saw 4096 positions back."""

from typing import Any

from fourfold.engine.decoder import Decoder


class Mistral(Decoder):
    """``model_type: mistral``. A sliding window shorter than the context is refused."""

    @classmethod
    def window(cls, config: dict[str, Any]) -> int | None:
        """``sliding_window``; as in transformers, a config that does not speak of it has 4096."""
        return config.get("sliding_window", 4096)


MODEL = Mistral

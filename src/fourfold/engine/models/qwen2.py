"""Qwen2 and Qwen2.5, dense: a Llama whose query, key and value projections have biases."""

from typing import Any

from fourfold.engine.decoder import Biases, Decoder


class Qwen2(Decoder):
    """``model_type: qwen2``. A sliding window shorter than the context is refused."""

    @classmethod
    def window(cls, config: dict[str, Any]) -> int | None:
        """``sliding_window``, as in transformers 4096 when not said, where ``use_sliding_window`` is on."""
        return config.get("sliding_window", 4096) if config.get("use_sliding_window") else None

    @classmethod
    def biases(cls, config: dict[str, Any]) -> Biases:
        """Of queries, keys and values, always."""
        return Biases(qkv=True)


MODEL = Qwen2

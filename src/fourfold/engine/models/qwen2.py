"""Qwen2 and Qwen2.5, dense: a Llama whose query, key and value projections have biases."""

from typing import Any

from fourfold.engine.decoder import Biases, Decoder, slides


class Qwen2(Decoder):
    """``model_type: qwen2``. Sliding windows in the upper layers, where ``use_sliding_window`` is on."""

    defaults = {"sliding_window": 4096, "max_window_layers": 28}

    @classmethod
    def window(cls, config: dict[str, Any], layer: int) -> int | None:
        """``sliding_window`` as ``layer_types`` says, or else in layers from ``max_window_layers``."""
        if not config.get("use_sliding_window"):
            return None
        upper = layer >= config["max_window_layers"]
        return config.get("sliding_window") if slides(config, layer, upper) else None

    @classmethod
    def biases(cls, config: dict[str, Any]) -> Biases:
        """Of queries, keys and values, always."""
        return Biases(qkv=True)


MODEL = Qwen2

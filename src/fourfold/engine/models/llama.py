"""Llama: grouped attention with rotary positions, SwiGLU MLP, RMS norms. SmolLM2 is one."""

from typing import Any

from fourfold.engine.decoder import Biases, Decoder


class Llama(Decoder):
    """``model_type: llama``. Biases where ``attention_bias`` and ``mlp_bias`` say so."""

    @classmethod
    def biases(cls, config: dict[str, Any]) -> Biases:
        """As the config says."""
        attention, mlp = (bool(config.get(key)) for key in ("attention_bias", "mlp_bias"))
        return Biases(attention, attention, mlp)


MODEL = Llama

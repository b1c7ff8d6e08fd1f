"""Llama: grouped attention with rotary positions, SwiGLU MLP, RMS norms. SmolLM2 is one."""

from fourfold.engine.decoder import Decoder, Layer, SelfAttention
from fourfold.engine.layers import GatedMLP
from fourfold.engine.weights import Weights


class Llama(Decoder):
    """``model_type: llama``. Biases where ``attention_bias`` and ``mlp_bias`` say so."""

    def build_layer(self, weights: Weights, prefix: str) -> Layer:
        """One block: input_layernorm, self_attn.{q,k,v,o}_proj, post_attention_layernorm, mlp.*_proj."""
        s = self.shape
        q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        attention_bias, mlp_bias = (bool(self.config.get(key)) for key in ("attention_bias", "mlp_bias"))
        qkv = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        gate_up = {"gate_proj": s.intermediate, "up_proj": s.intermediate}
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        return Layer(
            weights.norm(prefix + "input_layernorm", s.hidden, s.eps),
            SelfAttention(
                s,
                weights.fused(attention, qkv, s.hidden, attention_bias),
                weights.linear(attention + "o_proj", s.hidden, q, attention_bias),
            ),
            weights.norm(prefix + "post_attention_layernorm", s.hidden, s.eps),
            GatedMLP(
                weights.fused(mlp, gate_up, s.hidden, mlp_bias),
                weights.linear(mlp + "down_proj", s.hidden, s.intermediate, mlp_bias),
            ),
        )


MODEL = Llama

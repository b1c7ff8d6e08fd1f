"""GGUF tensor names to Hugging Face parameter names, by the gguf package's own maps read backwards."""

import gguf

MODULES = ("model.embed_tokens", "model.norm", "lm_head")
LAYER_MODULES = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "self_attn.q_norm",
    "self_attn.k_norm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
SUFFIXES = (".weight", ".bias")


def parameter_names(architecture: str, layers: int, router: str | None = None) -> dict[str, str]:
    """GGUF name -> parameter name, for every tensor that a model of ``layers`` layers can have.

    Stacks of experts are not among them; ``router`` is what chooses between these.
    """
    known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    to_gguf = gguf.get_tensor_name_map(known[architecture], layers)
    inner = LAYER_MODULES if router is None else (*LAYER_MODULES, router)
    modules = [*MODULES, *(f"model.layers.{i}.{name}" for i in range(layers) for name in inner)]
    names: dict[str, str] = {}
    for module in modules:
        if (base := to_gguf.get_name(module)) is not None:
            names |= {base + suffix: module + suffix for suffix in SUFFIXES}
    return names

"""Gemma 3 in GGUF: what its metadata leaves to the reader, as llama.cpp fills it in (src/llama-model.cpp).

Five layers in six have a sliding window and rotary speeds of their own; a scaling of the rotary embeddings is
meant for the others. Queries are scaled by the size of a head, but in the largest model by hidden / heads.
The converter stores the weights of norms with 1 added to them, for the code that it shares with other models.
"""

from typing import Any

from fourfold.checkpoint.gguf.values import Values

NORM_OFFSET = 1.0
PATTERN = 6
LAYERS_OF_THE_LARGEST = 62
SOFTCAP = "final_logit_softcapping"
FULL_THETA, SLIDING_THETA = 1e6, 1e4


def gemma3_settings(config: dict[str, Any], values: Values) -> dict[str, Any]:
    """What config.json of a gemma3_text has beyond the sizes in ``config``. Raises FourfoldError."""
    layers = config["num_hidden_layers"]
    pattern = values.count("attention.sliding_window_pattern", PATTERN)
    full = {"rope_type": "default", "rope_theta": values.positive("rope.freq_base", FULL_THETA)}
    if values.get("rope.scaling.type", "none") == "linear":
        full |= {"rope_type": "linear", "factor": values.positive("rope.scaling.factor")}
    sliding = {
        "rope_type": "default",
        "rope_theta": values.positive("rope.freq_base_swa", SLIDING_THETA),
    }
    largest = layers == LAYERS_OF_THE_LARGEST
    scalar = config["hidden_size"] // config["num_attention_heads"] if largest else config["head_dim"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": values.count("attention.sliding_window"),
        "layer_types": [
            "sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(layers)
        ],
        "rope_parameters": {"full_attention": full, "sliding_attention": sliding},
        "attn_logit_softcapping": None,
        "final_logit_softcapping": values.positive(SOFTCAP) if values.get(SOFTCAP) is not None else None,
    }

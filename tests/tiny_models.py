"""Builders of tiny models with real architectures, made on the spot, never downloaded."""

import json
from pathlib import Path

import torch


def tiny_config(model_type: str, **changes) -> dict:
    """A config.json of a few thousand parameters whose shapes are multiples of 32, unless changed."""
    config = {
        "architectures": [
            {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}.get(model_type, model_type)
        ],
        "model_type": model_type,
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "bfloat16",
    }
    return config | changes


def write_tiny_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 256 entries with a chat template: enough for the server and for text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|bos|>", "<|eos|>"]
    # 254 byte symbols and two specials fill the 256 rows; two rare control bytes fall to the unknown token
    vocabulary = {token: i for i, token in enumerate(specials + alphabet[:254])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<|bos|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def build_tiny_model(folder: Path, model_type: str = "llama", seed: int = 0, **changes) -> Path:
    """A random model of ``model_type`` saved by transformers itself, with tokenizer, in bf16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    values = tiny_config(model_type, **changes)
    config = AutoConfig.for_model(**{k: v for k, v in values.items() if k != "architectures"})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    write_tiny_tokenizer(folder)
    return folder


# model types that calibration is proved on, with what makes each what it is: 4 experts of which 2 are chosen,
# windows that are shorter than the test's sequences, and both kinds of layers of a hybrid
ARCHITECTURES: dict[str, dict] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 64,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma2": {
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
    },
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma3_text": {
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 32,
        "tie_word_embeddings": True,
    },
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "mlp"],
        "num_hidden_layers": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
    },
    "deepseek_v3": {
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 32,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 32,
        "num_key_value_heads": 4,
        "head_dim": 16,
    },
}


def build_architecture(folder: Path, model_type: str, **changes) -> Path:
    """A random model of one of ARCHITECTURES in which every parameter has its own values, norms and biases
    too, so that nothing which is left out or mixed up goes unseen.
    """
    build_tiny_model(folder, model_type, **(ARCHITECTURES[model_type] | changes))
    return make_distinct(folder)


def build_gemma3(folder: Path, **changes) -> Path:
    """A random gemma3: the text model of build_architecture and a vision tower, all values distinct."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "gemma3",
        text_config=tiny_config("gemma3_text", **(ARCHITECTURES["gemma3_text"] | changes)),
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    write_tiny_tokenizer(folder)
    return make_distinct(folder)


def make_distinct(folder: Path) -> Path:
    """Add noise to every parameter of a model, so that norms are not 1 and biases not 0."""
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(7)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, value in tensors.items():
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator) * 0.1
                tensors[name] = (value.float() + noise).to(value.dtype)
        save_file(tensors, file, metadata={"format": "pt"})
    return folder

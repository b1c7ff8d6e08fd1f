"""A bfloat16 Llama of Hugging Face as GGUF, for llama.cpp to round: the tensors, the sizes, the vocabulary.

GGUF holds the rows of the query and key heads in the order of interleaved rotary pairs, and norms in float32.
"""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer


def write_gguf(folder: Path, out: Path) -> None:
    """``folder`` must hold one file of weights of ``model_type: llama`` and a byte-level BPE tokenizer."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(out, "llama")
    add_sizes(writer, config)
    add_vocabulary(writer, folder, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        stored = names.get_name(name, try_suffixes=(".weight",))
        assert stored is not None, f"GGUF has no name for {name}"
        add_tensor(writer, stored, reordered(name, tensor, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_sizes(writer: gguf.GGUFWriter, config: dict) -> None:
    """The config's sizes under GGUF's names."""
    rope = config.get("rope_parameters") or config
    writer.add_name(config.get("_model_name_or_path") or "model")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def add_vocabulary(writer: gguf.GGUFWriter, folder: Path, config: dict) -> None:
    """The tokens by their ids, the merges and the special ones."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(config["vocab_size"])]
    special = set(tokenizer.all_special_tokens)
    kinds = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=len(tokens)).add_to_gguf(writer)


def reordered(name: str, tensor: torch.Tensor, config: dict) -> torch.Tensor:
    """Query and key rows from halves to pairs; all else as it is."""
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        rows, columns = tensor.shape
        heads = rows // config["head_dim"]
        return tensor.view(heads, 2, -1, columns).transpose(1, 2).reshape(rows, columns)
    return tensor


def add_tensor(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor) -> None:
    """Matrices in bfloat16, vectors in float32."""
    if tensor.ndim == 1:
        writer.add_tensor(name, tensor.float().numpy())
        return
    held = tensor.contiguous().view(torch.uint8).numpy().astype(np.uint8, copy=False)
    writer.add_tensor(name, held, raw_dtype=gguf.GGMLQuantizationType.BF16)

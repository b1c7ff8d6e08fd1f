"""Make every file that the engines are measured on, from one bfloat16 checkpoint, or from a seed.

python benchmarks/engine/models.py prepare BF16_FOLDER OUT --python-llamacpp LC/bin/python
python benchmarks/engine/models.py random OUT --tokenizer BF16_FOLDER [--layers 16 --seed 0]

``prepare`` writes OUT/bf16 (the head as a tensor of its own, equal to the embedding where the model ties
them), OUT/mxfp4 (Fourfold, all in MXFP4 with the head), OUT/mxfp4-vllm (Fourfold, head kept: what vLLM
takes), and for llama.cpp OUT/{q4_0,mxfp4}.gguf, everything in that type. All are rounded from the same
bfloat16 values. OUT/FILE-as-bf16 holds each one's rounded values in bfloat16, for the judge.

``random`` makes a Llama of 1.07 billion parameters with the tokenizer of another model: an engine is as fast
on random weights, and no package has such a model."""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def main() -> None:
    """Prepare, or make a random model and stop."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare")
    prepare.add_argument("source", type=Path)
    prepare.add_argument("out", type=Path)
    prepare.add_argument("--python-llamacpp", required=True)
    random = commands.add_parser("random")
    random.add_argument("out", type=Path)
    random.add_argument("--tokenizer", type=Path, required=True)
    random.add_argument("--layers", type=int, default=16)
    random.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.command == "random":
        make_random(options.out, options.tokenizer, options.layers, options.seed)
    else:
        make_all(options.source, options.out, options.python_llamacpp)


def make_all(source: Path, out: Path, python_llamacpp: str) -> None:
    """Everything that ``prepare`` promises; what is there already is left as it is."""
    out.mkdir(parents=True, exist_ok=True)
    bf16 = out / "bf16"
    if not bf16.exists():
        untie(source, bf16)
    quantize(bf16, out / "mxfp4", str(HERE / "mxfp4-head.yaml"))
    quantize(bf16, out / "mxfp4-vllm", "mxfp4")
    gguf = out / "bf16.gguf"
    if not gguf.exists():
        from gguf_writer import write_gguf

        write_gguf(bf16, gguf)
    subprocess.run([python_llamacpp, str(HERE / "engines" / "llamacpp_quantize.py"), str(gguf)], check=True)
    for name in dict.fromkeys(contender.file for contender in CONTENDERS if contender.bits < 16):
        quantize(out / name, out / f"{name}-as-bf16", "bf16", "--dialect", "plain")


def quantize(source: Path, out: Path, recipe: str, *options: str) -> None:
    """By Fourfold, unless it was done before."""
    if not out.exists():
        command = [sys.executable, "-m", "fourfold", "quantize", str(source), str(out), "--recipe", recipe]
        subprocess.run([*command, *options], check=True)


def untie(source: Path, out: Path) -> None:
    """A copy whose head is a tensor of its own, so that every tool may round it."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(source.glob("*.safetensors")):
        tensors |= load_file(shard)
    config = json.loads((source / "config.json").read_text())
    tensors.setdefault(HEAD, tensors[EMBEDDING].clone())
    write_folder(out, config | {"tie_word_embeddings": False}, tensors, source)


def write_folder(
    out: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], tokenizer: Path
) -> None:
    """A Hugging Face folder."""
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, out / name)


def make_random(out: Path, tokenizer: Path, layers: int, seed: int) -> None:
    """A Llama of width 2048 (32 heads, 8 key heads, MLP 8192) with a tied head; 16 layers: 1.07e9 values."""
    base = json.loads((tokenizer / "config.json").read_text())
    hidden, inner, heads, kv_heads, size = 2048, 8192, 32, 8, 64
    config = base | {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": size,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, std: float = 0.02) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * std).bfloat16()

    tensors = {
        EMBEDDING: matrix(base["vocab_size"], hidden),
        "model.norm.weight": torch.ones(hidden).bfloat16(),
    }
    residual = 0.02 / (2 * layers) ** 0.5
    for i in range(layers):
        prefix = f"model.layers.{i}."
        for name, rows, columns, std in (
            ("self_attn.q_proj", heads * size, hidden, 0.02),
            ("self_attn.k_proj", kv_heads * size, hidden, 0.02),
            ("self_attn.v_proj", kv_heads * size, hidden, 0.02),
            ("self_attn.o_proj", hidden, heads * size, residual),
            ("mlp.gate_proj", inner, hidden, 0.02),
            ("mlp.up_proj", inner, hidden, 0.02),
            ("mlp.down_proj", hidden, inner, residual),
        ):
            tensors[f"{prefix}{name}.weight"] = matrix(rows, columns, std)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = torch.ones(hidden).bfloat16()
    write_folder(out, config, tensors, tokenizer)
    print(f"{out}: {sum(t.numel() for t in tensors.values()):,} parameters")


if __name__ == "__main__":
    main()

"""GPTQ on a model of a given shape with random weights: time and peak GPU memory, layer by layer.

python benchmarks/accuracy/gptq_large.py llama-8b --samples 512 --sequence-tokens 2048 [--layers N]

Weights are drawn when a layer is reached, so that no disk is measured; finished layers are written to a
temporary folder as in a real run. With ``--layers`` only so many layers are run, and the time of the whole
model is predicted from the mean of all but the first. Asserted: what every layer hands on is finite, and its
tensors are on disk, whole.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from zlib import crc32

import torch

from fourfold.checkpoint import TensorInfo
from fourfold.compress.calibrated.loop import LayerLoop, key_of
from fourfold.compress.calibrated.store import LayerStore
from fourfold.compress.calibration import CalibrationSet
from fourfold.compress.model import Entry, Model
from fourfold.compress.recipe import Recipe
from fourfold.core.quantization import LayerScheme, Quantization

COMMON = {"rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "tie_word_embeddings": False}
SHAPES = {
    "llama-8b": COMMON
    | {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    "qwen3-235b": COMMON
    | {
        "model_type": "qwen3_moe",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "rope_theta": 1000000.0,
    },
    "tiny": COMMON
    | {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "vocab_size": 256,
    },
}


def main() -> None:
    """Run the layers and print what they took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--sequence-tokens", type=int, default=2048)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    config = SHAPES[options.shape]
    model = random_model(config, options.device)
    shape = (options.samples, options.sequence_tokens)
    token_ids = torch.randint(config["vocab_size"], shape, generator=torch.Generator().manual_seed(0))
    recipe = Recipe.model_validate({"name": "gptq", "rules": [{"weight": "mxfp4"}], "passes": ["gptq"]})
    with tempfile.TemporaryDirectory() as folder:
        loop = LayerLoop(
            model,
            recipe,
            CalibrationSet(token_ids, "random tokens", 0),
            LayerStore(Path(folder)),
            torch.device(options.device),
        )
        run(loop, options)


def run(loop: LayerLoop, options: argparse.Namespace) -> None:
    """Time ``start`` and every layer."""
    count = min(options.layers or len(loop.skeleton), len(loop.skeleton))
    begin = time.perf_counter()
    loop.start()
    seconds = [time.perf_counter() - begin]
    for index in range(count):
        begin = time.perf_counter()
        loop.step(index)
        assert all(bool(hidden.isfinite().all()) for hidden in loop._inputs), f"layer {index} is not finite"
        assert loop.store.find(key_of(index)) is not None
        seconds.append(time.perf_counter() - begin)
        print(f"layer {index}: {seconds[-1]:.1f} s, {memory()}", flush=True)
    later = seconds[2:] or seconds[1:]
    whole = seconds[0] + sum(later) / len(later) * len(loop.skeleton)
    print(
        f"{options.shape}, {options.samples} x {options.sequence_tokens} tokens: {sum(seconds):.0f} s for "
        f"{count} of {len(loop.skeleton)} layers, embedding {seconds[0]:.1f} s, {memory()}; "
        f"predicted for all: {whole:.0f} s"
    )


def memory() -> str:
    """The GPU's peak so far."""
    if not torch.cuda.is_available():
        return "no GPU"
    return f"peak GPU memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"


def random_model(config: dict, device: str) -> Model:
    """A model whose tensors are drawn when they are asked for, always the same for a name."""
    entries, layers = {}, {}
    for name, shape in parameter_shapes(config):
        info = TensorInfo(name, shape, torch.bfloat16, None, 2 * torch.Size(shape).numel())
        entries[name] = Entry(info, partial(draw, name, shape, device), info)
        if len(shape) == 2 and "proj" in name:
            layers[name.removesuffix(".weight")] = LayerScheme(weight="mxfp4", scale_rule="even")
    return Model(config, entries, Quantization(layers=layers))


def draw(name: str, shape: tuple[int, ...], device: str) -> torch.Tensor:
    """Ones for a norm, else Gaussian weights that keep the size of what they multiply."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16, device=device)
    generator = torch.Generator(device).manual_seed(crc32(name.encode()))
    values = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
    return values if "embed" in name else values * shape[-1] ** -0.5


def parameter_shapes(config: dict) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a dense or sparse decoder, experts one by one."""
    hidden, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    vocabulary = (config["vocab_size"], hidden)
    shapes: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", vocabulary)]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes += [(f"{layer}.input_layernorm.weight", (hidden,))]
        shapes += [(f"{layer}.post_attention_layernorm.weight", (hidden,))]
        shapes += [(f"{layer}.self_attn.{n}_proj.weight", (keys, hidden)) for n in "kv"]
        shapes += [(f"{layer}.self_attn.q_proj.weight", (queries, hidden))]
        shapes += [(f"{layer}.self_attn.o_proj.weight", (hidden, queries))]
        if config["model_type"] == "qwen3_moe":
            shapes += [(f"{layer}.self_attn.{n}_norm.weight", (head,)) for n in "qk"]
            shapes += [(f"{layer}.mlp.gate.weight", (config["num_experts"], hidden))]
            for expert in range(config["num_experts"]):
                shapes += mlp(f"{layer}.mlp.experts.{expert}", hidden, config["moe_intermediate_size"])
        else:
            shapes += mlp(f"{layer}.mlp", hidden, config["intermediate_size"])
    return [*shapes, ("model.norm.weight", (hidden,)), ("lm_head.weight", vocabulary)]


def mlp(prefix: str, hidden: int, width: int) -> list[tuple[str, tuple[int, ...]]]:
    """The three linear layers of a gated MLP."""
    up = [(f"{prefix}.{name}_proj.weight", (width, hidden)) for name in ("gate", "up")]
    return [*up, (f"{prefix}.down_proj.weight", (hidden, width))]


if __name__ == "__main__":
    main()

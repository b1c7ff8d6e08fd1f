"""Make the golden files: a tiny checkpoint, and what the two peers write for it under round-to-nearest.

    python make_goldens.py --peer source           (needs numpy, torch, safetensors)
    python make_goldens.py --peer quark            (amd-quark 0.13)
    python make_goldens.py --peer llm-compressor   (llmcompressor 0.14.0.1, compressed-tensors 0.19.0)

Run each in an environment with that peer at that version. The files in this folder were made so; the tests
compare what Fourfold writes with them and need neither peer. ``source`` comes first: both peers read it. The
weights come from a seeded numpy generator: rows of very different size, values on every tie of E2M1, and
outliers; two rows of k_proj are zero, to see what a peer writes for a block of zeros.
"""

import argparse
import json
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
SOURCE = HERE / "source"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "bfloat16",
}
LINEARS = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}
TIES = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]
# the peers' names for one weight format, and for activations beside it
QUARK_FLOATS = {
    "mxfp4": ("OCP_MXFP4Spec", None),
    "mxfp4-a4": ("OCP_MXFP4Spec", "OCP_MXFP4Spec"),
    "mxfp4-a6": ("OCP_MXFP4Spec", "OCP_MXFP6E2M3Spec"),
    "mxfp4-a8": ("OCP_MXFP4Spec", "OCP_MXFP8E4M3Spec"),
    "mxfp6-e2m3": ("OCP_MXFP6E2M3Spec", None),
    "mxfp6-e3m2": ("OCP_MXFP6E3M2Spec", None),
}
COMPRESSOR_SCHEMES = {
    "mxfp4": "MXFP4A16",
    "mxfp4-a4": "MXFP4",
    "mxfp8-e4m3": "MXFP8A16",
    "nvfp4": "NVFP4A16",
    "fp8-channel": "FP8_DYNAMIC",
}


def linear(shape: tuple[int, int], random: np.random.Generator) -> torch.Tensor:
    """Gaussian rows of sizes 2^-6 to 2^3 with outliers, and a first row of E2M1's ties at two scales."""
    rows, columns = shape
    values = random.standard_normal(shape) * np.exp2(random.uniform(-6, 3, (rows, 1)))
    values[random.random(shape) < 0.01] *= 20
    signs = random.choice([-1.0, 1.0], columns)
    values[0] = np.resize(TIES, columns) * signs * np.repeat([0.5, 2.0, 1.0], 32)[:columns]
    return torch.from_numpy(values).bfloat16()


def make_source() -> None:
    """The tiny checkpoint."""
    random = np.random.default_rng(20261122)
    weights = {f"model.layers.0.{name}.weight": linear(shape, random) for name, shape in LINEARS.items()}
    weights["model.layers.0.self_attn.k_proj.weight"][5:7] = 0
    for name in ("model.embed_tokens", "lm_head"):
        weights[f"{name}.weight"] = torch.from_numpy(random.standard_normal((32, 64))).bfloat16()
    for name in ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"):
        weights[f"model.{name}.weight"] = torch.ones(64, dtype=torch.bfloat16)
    SOURCE.mkdir(exist_ok=True)
    save_file(weights, SOURCE / "model.safetensors", metadata={"format": "pt"})
    (SOURCE / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def keep(made: Path, name: str, versions: dict[str, str], weights: bool) -> None:
    """Copy what a peer made into this folder; ``weights`` False keeps the configuration alone."""
    target = HERE / name
    target.mkdir(exist_ok=True)
    config = json.loads((made / "config.json").read_text())["quantization_config"]
    (target / "quantization_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    (target / "versions.json").write_text(json.dumps(versions) + "\n")
    if weights:
        shutil.copyfile(made / "model.safetensors", target / "model.safetensors")


def make_quark(folder: Path) -> None:
    """Quark's file-to-file quantization, one run for each format."""
    from quark.torch import ModelQuantizer
    from quark.torch.quantization.config import config as specs

    for name, (weight, activation) in QUARK_FLOATS.items():
        spec = getattr(specs, weight)(ch_axis=-1, is_dynamic=False).to_quantization_spec()
        inputs = activation and getattr(specs, activation)(ch_axis=-1, is_dynamic=True).to_quantization_spec()
        layer = specs.QLayerConfig(weight=spec, input_tensors=inputs)
        config = specs.QConfig(global_quant_config=layer, exclude=["lm_head", "*embed_tokens*"])
        ModelQuantizer(config).direct_quantize_checkpoint(
            pretrained_model_path=str(SOURCE), save_path=str(folder / name), device="cpu"
        )
        keep(folder / name, f"quark-{name}", {"amd-quark": version("amd-quark")}, "-a" not in name)


def make_quark_kv_cache(folder: Path) -> None:
    """Quark's in-memory quantization and export, which is the way to an FP8 KV cache; configuration only."""
    from quark.torch import ModelQuantizer, export_safetensors
    from quark.torch.quantization.config import config as specs
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.bfloat16)
    weight = specs.OCP_MXFP4Spec(ch_axis=-1, is_dynamic=False).to_quantization_spec()
    cache = specs.FP8E4M3PerTensorSpec(observer_method="min_max", is_dynamic=False).to_quantization_spec()
    patterns = ["*k_proj", "*v_proj"]
    layers = {name: specs.QLayerConfig(weight=weight, output_tensors=cache) for name in patterns}
    config = specs.QConfig(
        global_quant_config=specs.QLayerConfig(weight=weight),
        exclude=["lm_head"],
        layer_quant_config=layers,
        kv_cache_quant_config=layers,
        kv_cache_group=patterns,
    )
    quantizer = ModelQuantizer(config)
    model = quantizer.freeze(quantizer.quantize_model(model, [torch.arange(8)[None]]))
    export_safetensors(model, str(folder))
    keep(folder, "quark-mxfp4-kv8", {"amd-quark": version("amd-quark")}, False)


def make_llm_compressor(folder: Path) -> None:
    """llm-compressor's model-free quantization, one run for each scheme."""
    from llmcompressor import model_free_ptq

    versions = {name: version(name) for name in ("llmcompressor", "compressed-tensors")}
    for name, scheme in COMPRESSOR_SCHEMES.items():
        ignore = ["lm_head", "model.embed_tokens"]
        model_free_ptq(str(SOURCE), str(folder / name), scheme=scheme, ignore=ignore, device="cpu")
        keep(folder / name, f"llm-compressor-{name}", versions, "-a" not in name)


def main() -> None:
    """Run one maker."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", choices=["source", "quark", "llm-compressor"], required=True)
    peer = parser.parse_args().peer
    with tempfile.TemporaryDirectory() as folder:
        if peer == "source":
            make_source()
        else:
            {"quark": make_quark, "llm-compressor": make_llm_compressor}[peer](Path(folder))
            if peer == "quark":
                make_quark_kv_cache(Path(folder) / "kv")


if __name__ == "__main__":
    main()

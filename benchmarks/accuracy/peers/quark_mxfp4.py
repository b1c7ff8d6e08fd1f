"""AMD Quark: one model to MXFP4 by one of its methods. Runs in its own environment.

python quark_mxfp4.py --model DIR --out DIR --scheme w4a16 --method gptq --tokens TOKENS.pt

A method is 'rtn', or a '+'-joined list of Quark's algorithms in the order they are applied: rotation,
smooth, autosmoothquant, awq, gptq, gptaq, qronos, autoround. Each has the settings that Quark ships for the
model's type.
The decoder's linear layers are rounded, nothing else.
"""

import argparse
import copy
import shutil
from pathlib import Path

import torch
from quark.torch import ModelQuantizer, export_safetensors
from quark.torch.algorithm.api import blockwise_tuning_algo
from quark.torch.quantization.config.algo_configs import get_algo_config
from quark.torch.quantization.config.config import (
    AlgoConfig,
    OCP_MXFP4Spec,
    OCP_MXFP8E4M3Spec,
    QConfig,
    QLayerConfig,
)
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

INPUTS = {"w4a16": None, "w4a8": OCP_MXFP8E4M3Spec, "w4a4": OCP_MXFP4Spec}


def layers(scheme: str) -> QLayerConfig:
    """MXFP4 weights with the inputs of ``scheme``."""
    weight = OCP_MXFP4Spec(ch_axis=-1, is_dynamic=False).to_quantization_spec()
    spec = INPUTS[scheme]
    inputs = spec(ch_axis=-1, is_dynamic=True).to_quantization_spec() if spec else None
    return QLayerConfig(weight=weight, input_tensors=inputs)


def algorithms(steps: list[str], model_type: str) -> list[AlgoConfig]:
    """Quark's own settings of each step for this type of model."""
    found = {step: get_algo_config({"smooth": "smoothquant"}.get(step, step), model_type) for step in steps}
    missing = [step for step, config in found.items() if config is None]
    if missing:
        raise SystemExit(f"Quark has no settings of {', '.join(missing)} for models of type {model_type}.")
    return [copy.deepcopy(config) for config in found.values() if config is not None]


def quantize(model: nn.Module, method: str, scheme: str, data: DataLoader) -> nn.Module:
    """Apply the algorithms. AutoRound is no step of the quantizer: it tunes a model that RTN has prepared."""
    steps = [step for step in method.split("+") if step not in ("rtn", "autoround")]
    config = QConfig(
        global_quant_config=layers(scheme),
        exclude=["lm_head", "*embed_tokens*", "*norm*"],
        algo_config=algorithms(steps, model.config.model_type) or None,
    )
    quantizer = ModelQuantizer(config)
    if "autoround" not in method:
        return quantizer.quantize_model(model, data)
    base = copy.deepcopy(model)
    quantized = quantizer.quantize_model(model, data)
    (tuning,) = algorithms(["autoround"], model.config.model_type)
    return blockwise_tuning_algo(base, quantized, tuning, False, data)


def main() -> None:
    """Quantize and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scheme", choices=list(INPUTS), default="w4a16")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--dtype", default="auto", help="float32 for autoround and autosmoothquant without a GPU"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype).to(device).eval()
    tokens = torch.load(options.tokens, weights_only=True).to(device)
    data = DataLoader(tokens, batch_size=options.batch)
    quantized = quantize(model, options.method, options.scheme, data)
    with torch.no_grad():
        export_safetensors(ModelQuantizer.freeze(quantized), options.out)
    for file in Path(options.model).glob("tokenizer*"):
        shutil.copy(file, options.out)


if __name__ == "__main__":
    main()

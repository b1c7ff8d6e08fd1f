"""llm-compressor: one model to MXFP4 by one of its methods. Runs in its own environment.

python llmcompressor_mxfp4.py --model DIR --out DIR --scheme w4a16 --method gptq --tokens TOKENS.pt

A method is a '+'-joined list: any number of steps that change float weights (awq, smoothquant, spinquant),
then what rounds (rtn, gptq, autoround). 'mse' among them makes the scales of the rounding step minimise
squared error instead of following the largest value. The decoder's linear layers are rounded, nothing else.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from auto_round.schemes import PRESET_SCHEMES as AR_PRESET_SCHEMES
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.quant_scheme import MXFP4, MXFP4A16
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.autoround import AutoRoundModifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

MXFP8_INPUTS = QuantizationArgs(
    num_bits=8,
    type="float",
    strategy="group",
    group_size=32,
    dynamic=True,
    symmetric=True,
    scale_dtype="torch.uint8",
)
INPUTS = {"w4a16": None, "w4a8": MXFP8_INPUTS, "w4a4": MXFP4["input_activations"]}
IGNORE = ["lm_head", "re:.*embed_tokens$"]


def scheme(name: str, mse: bool) -> dict[str, QuantizationScheme]:
    """MXFP4 weights with the inputs of ``name``."""
    weights = MXFP4A16["weights"].model_copy(update={"observer": "memoryless_mse"} if mse else {})
    return {
        "group_0": QuantizationScheme(targets=["Linear"], weights=weights, input_activations=INPUTS[name])
    }


def modifiers(method: str, name: str) -> list[Modifier]:
    """The steps of a method, in order."""
    steps = method.split("+")
    groups = scheme(name, "mse" in steps)
    rounding = {"rtn": QuantizationModifier, "gptq": GPTQModifier}
    recipe: list[Modifier] = []
    for step in steps:
        if step == "awq":
            recipe.append(AWQModifier(duo_scaling="both"))
        elif step == "smoothquant":
            recipe.append(SmoothQuantModifier(smoothing_strength=0.5))
        elif step == "spinquant":
            recipe.append(SpinQuantModifier(rotations=["R1", "R2"]))
        elif step == "autoround":
            recipe.append(AutoRoundModifier(scheme="MXFP4", ignore=IGNORE, enable_torch_compile=False))
        elif step != "mse":
            recipe.append(rounding[step](config_groups=groups, ignore=IGNORE))
    return recipe


def work_around(method: str, name: str) -> None:
    """What keeps a method from running here at all, and does not change what it computes."""
    if not torch.cuda.is_available():
        torch.Tensor.pin_memory = lambda self, *_: self  # AWQ pins its caches, which fails without a GPU
    if "autoround" in method and name != "w4a4":
        # the only MXFP4 scheme that the modifier can translate rounds activations to 4 bits as well
        AR_PRESET_SCHEMES["MXFP4"].act_bits = 16


def finish(model: PreTrainedModel, out: Path, name: str) -> None:
    """Save, with the activation format that was asked for, and without transforms that are all merged."""
    for module in model.modules():
        if found := getattr(module, "quantization_scheme", None):
            found.input_activations = INPUTS[name]
    model.save_pretrained(out, save_compressed=True)
    config = json.loads((out / "config.json").read_text())
    transforms = config["quantization_config"].get("transform_config") or {}
    groups = transforms.get("config_groups", {}).values()
    if all(use["location"].startswith("weight_") for group in groups for use in group["apply"]):
        config["quantization_config"]["transform_config"] = {}
        (out / "config.json").write_text(json.dumps(config, indent=2))


def main() -> None:
    """Quantize and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scheme", choices=list(INPUTS), default="w4a16")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    tokens = torch.load(options.tokens, weights_only=True)
    batches = [
        {"input_ids": batch, "attention_mask": torch.ones_like(batch)}
        for batch in tokens.split(options.batch)
    ]
    work_around(options.method, options.scheme)
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(options.model),
        recipe=modifiers(options.method, options.scheme),
        dataset=DataLoader(batches, batch_size=None),
        num_calibration_samples=len(batches),
    )
    finish(model, options.out, options.scheme)
    for file in Path(options.model).glob("tokenizer*"):
        shutil.copy(file, options.out)


if __name__ == "__main__":
    main()

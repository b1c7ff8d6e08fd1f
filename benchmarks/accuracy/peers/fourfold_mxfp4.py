"""Fourfold with the command line of the peers' scripts, so that it can be given the same token ids.

python fourfold_mxfp4.py --model DIR --out DIR --scheme w4a16 --method gptq --tokens TOKENS.pt

A method is a '+'-joined list of passes, such as rtn, gptq or smoothquant+gptq. Imports are those of
``fourfold quantize``, and so is how long threads wait for work.
"""

import argparse
import tempfile
from pathlib import Path

from fourfold.core.imports import SPINS_BETWEEN_SMALL_PARTS, importing, patience

patience(SPINS_BETWEEN_SMALL_PARTS)
with importing():
    import torch

    from fourfold.compress import load_recipe, quantize
    from fourfold.compress.calibration import CalibrationSet

INPUTS = {"w4a16": "", "w4a8": "activation: mxfp8-e4m3", "w4a4": "activation: mxfp4"}
RECIPE = """\
name: {name}
description: {name}
rules:
  - weight: mxfp4
    scale_rule: even
    {inputs}
passes: [{passes}]
"""


def main() -> None:
    """Quantize and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scheme", choices=list(INPUTS), default="w4a16")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--tokens", type=Path, required=True)
    options = parser.parse_args()
    passes = ", ".join(options.method.split("+"))
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        name = f"{options.scheme}-{options.method}"
        file.write(RECIPE.format(name=name, inputs=INPUTS[options.scheme], passes=passes))
        file.flush()
        recipe = load_recipe(file.name)
    tokens = torch.load(options.tokens, weights_only=True)
    quantize(options.model, options.out, recipe, calibration=CalibrationSet(tokens, options.tokens.name, 0))


if __name__ == "__main__":
    main()

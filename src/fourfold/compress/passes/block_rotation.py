"""Block rotation: every 32 inputs of a linear layer times the Hadamard matrix, the weight turned to match.

The rotation stays inside the block that shares a scale. That is the form that helps MXFP4: a rotation over
all channels moves an outlier's energy into every block's power-of-two scale (Shao et al., Block Rotation is
All You Need for MXFP4 Quantization, arXiv:2511.04214; MR-GPTQ, arXiv:2509.23202). The matrix is orthogonal,
so nothing changes before rounding. No data is looked at; the pass goes layer by layer only because what it
turns is turned in memory.

The price is paid when the model runs: each distinct input is multiplied by a [32, 32] matrix, online, by the
reader of the checkpoint. Without rounded activations (W4A16) it often buys nothing, because weights alone
have few outliers.
"""

from pydantic import Field

from fourfold.compress.calibrated.work import LayerWork
from fourfold.compress.model import Model
from fourfold.compress.pipeline import Pass
from fourfold.compress.rotated import note_online, rotated_model, turn_weight
from fourfold.core.records import Record
from fourfold.formats import hadamard


class Options(Record):
    """``modules``: globs of the linear layers to rotate; those that the recipe keeps are never rotated."""

    modules: list[str] = Field(["*"], min_length=1)


def prepare(model: Model, options: Options) -> Model:
    """``model`` whose scheme says what is rotated."""
    return rotated_model(model, options.modules, "hadamard", PASS.name)


def rotate_layer(work: LayerWork, options: Options) -> None:
    """Turn the weights [out, in] of the layer; from now on its linear layers turn their inputs."""
    note_online(work)
    matrix = hadamard().to(work.device)
    for name, scheme in work.schemes.items():
        if scheme.input_transform == "hadamard":
            turn_weight(work.linears[name], matrix)


PASS = Pass("block-rotation", "rotate", prepare=prepare, layer=rotate_layer, options=Options)

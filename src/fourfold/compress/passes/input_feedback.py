"""Input feedback: what rounding one value of an input loses, the next values of its group make up for.

The recipe's activation format stays what it is; of the values that it has near an input, those are taken that
change the layer's output least, by the weight's own W^T W (:mod:`fourfold.kernels.feedback`, which is GPTQ
with the parts of weight and input changed). Nothing is calibrated or stored but the size of the groups. It
helps where inputs have few bits (W4A4), and more behind ``block-rotation``.

The price is paid when the model runs, by its reader: ``group`` / 2 multiply-adds for every value, before the
product, and one rounding for each linear layer, where layers with one input could share theirs. Readers that
round to nearest still answer, less well.
"""

from pydantic import Field

from fourfold.compress.calibrated.work import LayerWork
from fourfold.compress.model import Model
from fourfold.compress.pipeline import Pass
from fourfold.compress.rotated import with_inputs
from fourfold.core.errors import UsageError
from fourfold.core.quantization import FeedbackGroup, LayerScheme
from fourfold.core.records import Record
from fourfold.kernels.feedback import takes_feedback


class Options(Record):
    """``modules``: globs of the linear layers; ``group``: neighbours that make up for each other."""

    modules: list[str] = Field(["*"], min_length=1)
    group: FeedbackGroup = 128


def prepare(model: Model, options: Options) -> Model:
    """``model`` whose scheme says which inputs are rounded so. Experts are left alone.

    Raises UsageError when there are none.
    """

    def may(name: str, scheme: LayerScheme) -> bool:
        return takes_feedback(scheme.activation) and ".experts." not in name

    fed_back = with_inputs(model, options.modules, {"input_feedback": options.group}, may)
    if fed_back is None:
        raise UsageError(
            f"The pass '{PASS.name}' finds no input to round: no linear layer that matches `modules` "
            f"({', '.join(options.modules)}) has an activation format of floats in blocks of 32 (mxfp4, "
            "mxfp6-*, mxfp8-*). Give the rule an `activation`, or remove the pass."
        )
    return fed_back


def note(work: LayerWork, options: Options) -> None:
    """Tell readers, once a model, what they should do."""
    if work.index == 0:
        work.notes.append(
            f"Inputs of linear layers are rounded with feedback in groups of up to {options.group} values "
            "(input_feedback in config.json). Readers that round them to nearest answer less well."
        )


PASS = Pass("input-feedback", "inputs", prepare=prepare, layer=note, options=Options)

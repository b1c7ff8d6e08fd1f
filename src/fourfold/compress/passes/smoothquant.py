"""SmoothQuant: divide each channel of an activation by s_j and multiply the weights that read it by s_j, with

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

so that outliers move from activations, which are rounded hard as they come, into weights (Xiao et al.,
arXiv:2211.10438). The scales are folded into the norm before, as there, and also into ``v_proj`` and
``up_proj``. Unlike there they are divided by their geometric mean, so that norms keep their size, and held
within a factor of a thousand of it.

``alpha`` is the share of the difficulty that weights take over: 0.5 is the paper's for most models, 0.75 to
0.9 for those with large outliers. There is no search and no look at formats: where activations are not
rounded, or a block of 32 holds an outlier in already, weights pay for nothing. ``autosmoothquant`` looks.
"""

import torch
from pydantic import Field

from fourfold.compress.calibrated.groups import Group
from fourfold.compress.calibrated.smoothing import (
    Member,
    balanced,
    channel_largest,
    smooth,
    weight_largest,
)
from fourfold.compress.calibrated.work import LayerWork
from fourfold.compress.pipeline import Pass
from fourfold.core.records import Record


class Options(Record):
    """``alpha``: 0 leaves activations as they are, 1 makes all channels equally large."""

    alpha: float = Field(0.5, ge=0, le=1)


def smooth_layer(work: LayerWork, options: Options) -> None:
    """Scale every group of one layer."""

    def pick(group: Group, members: list[Member]) -> torch.Tensor:
        inputs, weights = channel_largest(group, members), weight_largest(group, members)
        return balanced(inputs**options.alpha / weights ** (1 - options.alpha))

    smooth(work, pick)


PASS = Pass("smoothquant", "smooth", layer=smooth_layer, options=Options)

"""GPTQ: round column by column, and let the columns not yet rounded make up for each error.

With inputs X [n, in], H = X^T X / n + damping, and U the upper Cholesky factor of H^-1, rounding column j with
the error e_j = (w_j - q_j) / U_jj changes the later columns by -e_j U_j,j+1.. (Frantar et al., arXiv:2210.17323).

Block formats share a scale among 32 columns. The scale of a block is taken when its first column is reached,
from the weights as they then are, errors of all blocks before it included. ``order: activation`` works through
whole blocks, those with the largest activations first, so that blocks stay as they are stored and no reader
needs to know of the order. The price of GPTQ is one more run of the layer and a Cholesky factor per distinct
input; linear layers that share an input share both.
"""

from typing import Literal

import torch
from pydantic import Field

from fourfold.compress.calibrated.work import LayerWork
from fourfold.compress.pipeline import Pass
from fourfold.core.records import Record


class Options(Record):
    """``damping`` is a share of the mean diagonal of H."""

    damping: float = Field(0.01, gt=0, le=1)
    order: Literal["natural", "activation"] = "activation"

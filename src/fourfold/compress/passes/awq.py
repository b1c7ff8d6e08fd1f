"""AWQ: protect the weights that meet large activations by making them larger before they are rounded.

    s_j = mean|X_j|^a, with the a of 20 from 0 to 1 that leaves the smallest error at the output

(Lin et al., arXiv:2306.00978, without its clipping search: with power-of-two scales that is a choice of scale
rule). One a for each group of linear layers that share an input; activations are not rounded in the search,
and 1/s is folded into the operation before.

What power-of-two block scales change. Under INT4, growing one weight of a group is nearly free and divides
its error by s until it becomes the group's largest. E2M1 is floating: above a sixth of its block's largest
value a weight's relative error hardly depends on its size, so that growing it wins little unless it was
small, and a power of two common to the block wins nothing at all. Expect less than the paper's gains. The
error is taken at the outputs of the linear layers rather than of the whole attention or MLP block.
"""

import torch

from fourfold.compress.calibrated.groups import Group
from fourfold.compress.calibrated.smoothing import Member, balanced, channel_mean, choose, smooth
from fourfold.compress.calibrated.work import LayerWork
from fourfold.compress.pipeline import NoOptions, Pass

STEPS = 20


def smooth_layer(work: LayerWork, options: NoOptions) -> None:
    """Scale every group of one layer."""
    smooth(work, pick)


def pick(group: Group, members: list[Member]) -> torch.Tensor | None:
    """The group's scales with the smallest output error under rounded weights."""
    mean = channel_mean(group, members)
    candidates = [balanced(mean ** (step / STEPS)) for step in range(1, STEPS + 1)]
    return choose(group, members, candidates, activations=False, each_cell=False)


PASS = Pass("awq", "smooth", layer=smooth_layer)

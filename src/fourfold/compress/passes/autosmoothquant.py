"""AutoSmoothQuant: smoothing whose strength each layer finds for itself, with nothing for a user to tune.

The idea is that of AMD Quark's algorithm of this name: for each group of linear layers, try exponents a in
s_j = max|X_j|^a, round weights and activations as they will be, and keep what leaves the smallest error at
the output. Here the candidates are AWQ's mean|X_j|^a and SmoothQuant's max|X_j|^a / max|W_j|^(1-a), and since
the blocks of a microscaling format round by themselves, each block of channels takes its own best one. The
whole group's error, on rows that were not searched, then decides among these, the best single candidate, and
no scaling. It is taken at the outputs of linear layers, not of attention and MLP as Quark does.

Scales fold into the operation before. When a rotation follows in the recipe, the search rounds what will have
been rotated. The price is 21 roundings of each weight and of half a thousand inputs.
"""

import torch

from fourfold.compress.calibrated.groups import Group
from fourfold.compress.calibrated.smoothing import (
    Member,
    balanced,
    channel_largest,
    channel_mean,
    choose,
    smooth,
    weight_largest,
)
from fourfold.compress.calibrated.work import LayerWork
from fourfold.compress.pipeline import NoOptions, Pass

EXPONENTS = tuple(step / 10 for step in range(1, 11))


def smooth_layer(work: LayerWork, options: NoOptions) -> None:
    """Scale every group of one layer."""
    smooth(work, pick)


def pick(group: Group, members: list[Member]) -> torch.Tensor | None:
    """The group's scales with the smallest output error under the scheme's formats."""
    largest, mean = channel_largest(group, members), channel_mean(group, members)
    weights = weight_largest(group, members)
    candidates = [balanced(mean**a) for a in EXPONENTS]
    candidates += [balanced(largest**a / weights ** (1 - a)) for a in (0.0, *EXPONENTS[:-1])]
    return choose(group, members, candidates, activations=True, each_cell=True)


PASS = Pass("autosmoothquant", "smooth", layer=smooth_layer)

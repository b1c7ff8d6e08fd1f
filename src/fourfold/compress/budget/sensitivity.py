"""What each format costs each weight: a second-order estimate of KL(original || quantized), nats a token.

Near the original model KL is a quadratic form of the change of the weights, 1/2 d^T F d, where F is the
Fisher information (Martens, arXiv:1412.1193). F is the mean of g g^T over score vectors g, the gradients of
the log-likelihood of labels that the model itself draws; with such labels the gradients of different tokens
are uncorrelated, so that one backward pass over a sequence of T tokens gives one sample of T F. So for each
candidate format with its change d = Q(W) - W,

    cost(W, format) = mean over sequences of (g . d)^2 / (2 T),

which sees how the errors of one weight matrix add up, as a diagonal estimate would not. The price is a
backward pass a sequence with the whole model in memory, and noise: the relative standard deviation of one
cost is about sqrt(2 / sequences). Costs of different weights are taken to add. The rounding of activations is
not in it, nor what passes other than rounding to nearest win back.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from fourfold.compress.calibrated.skeleton import Skeleton
from fourfold.compress.calibrated.whole import WholeModel
from fourfold.compress.calibration import CalibrationSet
from fourfold.compress.passes.rtn import check_finite
from fourfold.core.errors import FourfoldError
from fourfold.core.quantization import LayerScheme
from fourfold.formats import get_format

Costs = dict[str, dict[str, float]]
"""Module name -> format -> predicted KL in nats a token."""


def sensitivities(
    skeleton: Skeleton,
    calibration: CalibrationSet,
    candidates: Mapping[str, Sequence[LayerScheme]],
    progress: Callable[[int, int], None] | None = None,
) -> Costs:
    """What each of its ``candidates`` costs each module that transformers has as a linear layer.

    Raises FourfoldError for weights and logits that are not finite.
    """
    model = WholeModel(skeleton)
    changes = {name: _changes(model, name, candidates[name]) for name in model.schemes if name in candidates}
    for name in changes:
        model.linears[name].weight.requires_grad_(True)
    sums: Costs = {name: dict.fromkeys(by_format, 0.0) for name, by_format in changes.items()}
    draw = torch.Generator(model.device).manual_seed(calibration.seed)
    for done, sequence in enumerate(calibration.token_ids):
        log_likelihood(model, sequence, draw).backward()
        for name, by_format in changes.items():
            gradient = model.linears[name].weight.grad
            if gradient is None:  # an expert that no token reached
                continue
            for form, change in by_format.items():
                sums[name][form] += float((gradient * change).sum(dtype=torch.float64)) ** 2
            model.linears[name].weight.grad = None
        if progress is not None:
            progress(done + 1, len(calibration.token_ids))
    per_token = 2 * calibration.token_ids.numel()
    return {name: {f: v / per_token for f, v in costs.items()} for name, costs in sums.items()}


def log_likelihood(model: WholeModel, sequence: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """The summed log-likelihood of labels that the model draws for each position of ``sequence`` [T].

    Raises FourfoldError for logits that are not finite.
    """
    log_p = torch.log_softmax(model(sequence[None])[0], -1)
    if log_p.isnan().any():
        raise FourfoldError(
            "The original model gives logits that are not finite on this calibration text, so that nothing "
            "tells what its formats cost. `fourfold evaluate` it, or use another text."
        )
    labels = torch.multinomial(log_p.detach().exp(), 1, generator=draw)
    return log_p.gather(1, labels).sum()


def _changes(model: WholeModel, name: str, schemes: Sequence[LayerScheme]) -> dict[str, torch.Tensor]:
    """What each of ``schemes`` changes of the weight ``name``, bfloat16 [out, in], by format."""
    weight = model.linears[name].weight.detach()
    check_finite(f"{name}.weight", weight)
    rounded = {s.weight: get_format(s.weight).fake_quantize(weight, s.scale_rule) for s in schemes}
    return {form: (values - weight).to(torch.bfloat16) for form, values in rounded.items()}

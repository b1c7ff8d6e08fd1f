"""Round to nearest, under the block scales that leave the smallest error in the layer's output.

Each block tries the exponent of FLOOR, one more and one less (other scales: shrunk in steps of 5 % down to
60 %) and keeps the one with the smallest ``sum_j h_j (w_j - q_j)^2``, where h_j is the mean square of input
j on the calibration set as the served model multiplies it: a Hessian reduced to its diagonal. The scale
rule ``mse`` is the same search with h = 1 and without calibration. NVFP4 keeps its global scale.

The price is one run of the layer and one rounding per candidate; correlations between inputs are not seen.
"""

from fourfold.compress.calibrated.scale_search import global_scale, mean_squares, search_scales
from fourfold.compress.calibrated.work import LayerWork
from fourfold.compress.passes.rtn import check_finite
from fourfold.compress.pipeline import NoOptions, Pass
from fourfold.formats import get_format


def round_layer(work: LayerWork, options: NoOptions) -> None:
    """Finish every weight of the layer that the scheme names. Raises FourfoldError for NaN or Inf in one."""
    for name in work.schemes:
        check_finite(f"{name}.weight", work.linears[name].weight)
    importance = mean_squares(work)
    for name, scheme in work.schemes.items():
        form, weight = get_format(scheme.weight), work.linears[name].weight.detach()
        scales = search_scales(weight, form, importance[name])
        whole = global_scale(weight, form)
        work.finish(name, form.quantize_with_scales(weight, scales, whole, scheme.scale_rule))


PASS = Pass("mse-scale", "round", layer=round_layer)

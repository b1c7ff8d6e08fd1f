"""Which formats each weight may take: what its dialect can store, its shape allows, and its inputs fit.

A layer whose inputs are rounded gets inputs at least as fine as its weight, since kernels for coarser inputs
than weights do not exist; and FP8 weights go with FP8 inputs, MX weights with MX inputs.
"""

from collections.abc import Iterable

from fourfold.checkpoint import TensorInfo
from fourfold.checkpoint.dialect import Dialect
from fourfold.compress.model import formatted
from fourfold.core.errors import UsageError
from fourfold.core.quantization import LayerScheme, Quantization
from fourfold.formats import get_format

FORMATS = ("mxfp4", "mxfp6-e2m3", "mxfp8-e4m3", "fp8-channel")


def candidates(dialect: Dialect, weight: TensorInfo, scheme: LayerScheme) -> list[LayerScheme]:
    """The schemes that ``weight`` [out, in] may have: the recipe's ``scheme`` first, then others."""
    others = [_in_format(scheme, form) for form in FORMATS if form != scheme.weight]
    return [scheme, *(s for s in others if s and _fits(weight, s) and _expresses(dialect, weight, s))]


def stored_bytes(dialect: Dialect, weight: TensorInfo, forms: Iterable[str]) -> dict[str, int]:
    """What ``weight`` takes on disk in each of ``forms``, scales included."""
    return {f: sum(p.nbytes for p in dialect.plan(formatted(weight, f))) for f in forms}


def _in_format(scheme: LayerScheme, form: str) -> LayerScheme | None:
    block_format = get_format(form)
    activation = scheme.activation
    if activation is not None:
        if _is_mx(activation) != _is_mx(form):
            return None
        if _is_mx(form) and get_format(activation).bits_per_value < block_format.bits_per_value:
            activation = form
    rule = block_format.default_rule and (scheme.scale_rule or block_format.default_rule.value)
    return scheme.model_copy(update={"weight": form, "scale_rule": rule, "activation": activation})


def _is_mx(form: str) -> bool:
    return form.startswith("mx")


def _fits(weight: TensorInfo, scheme: LayerScheme) -> bool:
    return weight.shape[-1] % (get_format(scheme.weight).block_size or 1) == 0


def _expresses(dialect: Dialect, weight: TensorInfo, scheme: LayerScheme) -> bool:
    try:
        dialect.plan(formatted(weight, scheme.weight))
        dialect.quantization_config(Quantization(layers={weight.name.removesuffix(".weight"): scheme}), [])
    except UsageError:
        return False
    return True

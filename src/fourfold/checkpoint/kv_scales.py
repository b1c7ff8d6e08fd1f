"""The scales of an FP8 KV cache: which modules have them, their shapes, and what can be wrong with them.

value = E4M3 code * scale, so that a cache holds up to 448 * scale. A scale goes with a k_proj or v_proj and
is a float32 tensor: [1] for ``fp8``, [key heads] for ``fp8-head``. Where nothing was calibrated it is one,
which holds every value up to 448; readers assume the same where none is stored.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from fourfold.checkpoint.dialect import TOWER, module_of
from fourfold.checkpoint.tensors import TensorInfo
from fourfold.core.errors import FourfoldError, UsageError
from fourfold.core.quantization import KVCacheFormat

PER_HEAD: KVCacheFormat = "fp8-head"
SCALED: tuple[KVCacheFormat, ...] = ("fp8", PER_HEAD)
CACHED_PROJECTIONS = (".k_proj.weight", ".v_proj.weight")


def cached_projections(infos: Iterable[TensorInfo]) -> list[str]:
    """The k_proj and v_proj modules whose outputs a cache holds; those of image and audio towers are not."""
    modules = (module_of(info.name) for info in infos if info.name.endswith(CACHED_PROJECTIONS))
    return [m for m in modules if not any(TOWER.search(part) for part in m.split("."))]


def unit_scales(
    form: KVCacheFormat | None, infos: Iterable[TensorInfo], config: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """A scale of one for every cached projection; none for a format that has no stored scales.

    Raises UsageError for a model without such projections, FourfoldError for a config without heads to count.
    """
    if form not in SCALED:
        return {}
    modules = cached_projections(infos)
    if not modules:
        raise UsageError(
            f"The recipe asks for a KV cache in {form}, but the model has no k_proj and v_proj to put its "
            "scales beside. Use a recipe without kv_cache."
        )
    return dict.fromkeys(modules, torch.ones(key_heads(config) if form == PER_HEAD else 1))


def calibrated_scales(
    form: KVCacheFormat | None,
    infos: Iterable[TensorInfo],
    config: dict[str, Any],
    given: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """``given`` in the shape that is stored, completed by ones where ``fp8`` was not calibrated.

    Raises UsageError for ``fp8-head`` without its scales, FourfoldError for a wrong shape or value.
    """
    scales = unit_scales(form, infos, config)
    for module, unit in scales.items():
        if module in given:
            scales[module] = given[module].detach().float().cpu().reshape(-1)
            if problem := scale_problem(scales[module], unit.numel()):
                raise FourfoldError(f"The KV scale of {module} {problem}. Calibrate with other texts.")
        elif form == PER_HEAD:
            raise UsageError(
                f"A KV cache in {form} lives by its scales, and {module} has none. Calibrate them "
                "(--calibration), or choose kv_cache: fp8."
            )
    return scales


def scale_problem(scale: torch.Tensor, count: int) -> str | None:
    """What is wrong with ``scale``, which should hold ``count`` numbers; None when nothing is."""
    if scale.numel() != count:
        return f"holds {scale.numel()} numbers where the cache has {count}"
    if not (scale.isfinite() & (scale > 0)).all():
        return "is not a positive number"
    return None


def kv_scale_problems(
    form: KVCacheFormat | None,
    infos: Iterable[TensorInfo],
    config: dict[str, Any],
    scales: Mapping[str, torch.Tensor],
) -> Iterator[str]:
    """What ``fourfold verify`` finds: scales that are missing, of a wrong shape, or no positive numbers."""
    if form not in SCALED:
        return
    count = key_heads(config) if form == PER_HEAD else 1
    for module in cached_projections(infos):
        if module not in scales:
            yield f"{module} has no KV scale for {form}, so readers take 1. Quantize the source again."
        elif problem := scale_problem(scales[module], count):
            yield f"The KV scale of {module} {problem}. Quantize the source again."


def key_heads(config: dict[str, Any]) -> int:
    """How many key heads a layer has. Raises FourfoldError when the configuration does not say."""
    text = config.get("text_config")
    config = text if isinstance(text, dict) else config
    heads = config.get("num_key_value_heads") or config.get("num_attention_heads")
    if not isinstance(heads, int) or heads < 1:
        raise FourfoldError(
            f"config.json has no usable num_key_value_heads ({heads}), and KV scales per head need it. "
            "Restore the model's original config."
        )
    return heads

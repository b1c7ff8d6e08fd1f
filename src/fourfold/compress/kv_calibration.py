"""Scales of an FP8 KV cache from the keys and values that reach the cache during calibration.

    scale = max |k| / 448      and the same for v; over all key heads of a layer, or for each key head

The largest value, and no percentile of it: E4M3 rounds relative to each value, so that a larger scale costs
nothing until values fall below 2^-6 times it, while what lies beyond 448 * scale is lost. Quark
(PerTensorMinMaxObserver) and llm-compressor with its observer static_minmax store the same numbers, and vLLM
reads them; llm-compressor's default is a moving average of the largest values of its batches, which is less.
Keys are taken where the cache takes them: after their norm and rotation, before grouped heads are repeated.

The price of one static scale is that a text with larger keys than any of the calibration set saturates.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch

from fourfold.checkpoint.kv_scales import PER_HEAD, SCALED
from fourfold.compress.names import LAYER
from fourfold.core.errors import FourfoldError
from fourfold.core.quantization import KVCacheFormat

E4M3_LARGEST = 448.0


class KVObserver:
    """Stands where transformers' decoder layers expect a cache (``past_key_values``), and stores nothing.

    ``amax`` maps a layer's index to float32 [2, key heads]: the largest magnitude of its keys, of its values.
    It is all that there is to keep of an interrupted run. To linear attention it is a cache without a past.
    """

    def __init__(self, amax: dict[int, torch.Tensor] | None = None):
        self.amax = amax or {}

    @torch.no_grad()
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Look at keys and values [B, key heads, T, D] of a layer; they are returned as they came."""
        seen = torch.stack(
            [states.abs().amax((0, 2, 3)).float().cpu() for states in (key_states, value_states)]
        )
        self.amax[layer_idx] = torch.maximum(self.amax.get(layer_idx, seen), seen)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing is remembered."""
        return 0

    def is_recording_past(self, layer_idx: int) -> bool:
        """Never."""
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """None: every sequence begins anew."""

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """None: every sequence begins anew."""

    def update_conv_state(self, states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``states``, which are the whole sequence."""
        return states

    def update_recurrent_state(self, states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``states``."""
        return states


def scales(
    observer: KVObserver, kind: KVCacheFormat | None, modules: Iterable[str]
) -> dict[str, torch.Tensor]:
    """By k_proj and v_proj of ``modules``: float32 [1] for ``fp8``, [key heads] for ``fp8-head``.

    ``modules`` are ``checkpoint.kv_scales.cached_projections``. Layers whose keys reached no cache are left
    out; formats without stored scales have none. Raises FourfoldError for keys or values that are not finite.
    """
    found: dict[str, torch.Tensor] = {}
    for module in modules if kind in SCALED else ():
        index = _layer_of(module)
        if index is None or index not in observer.amax:
            continue
        amax = observer.amax[index][0 if module.endswith(".k_proj") else 1]
        if not amax.isfinite().all():
            raise FourfoldError(
                f"What {module} puts into the KV cache is not finite for the calibration texts, so that no "
                "scale can hold it. Look for damaged weights with `fourfold verify`, or leave kv_cache out."
            )
        amax = amax if kind == PER_HEAD else amax.max().reshape(1)
        # a head that is always zero is held by any scale
        found[module] = torch.where(amax > 0, amax / E4M3_LARGEST, torch.ones_like(amax))
    return found


def _layer_of(module: str) -> int | None:
    match = LAYER.search(module)
    return int(re.findall(r"\d+", match.group())[-1]) if match else None

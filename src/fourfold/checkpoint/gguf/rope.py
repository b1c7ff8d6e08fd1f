"""Llama 3.1's rotary scaling, found again from the divisors that a GGUF file holds instead of its parameters.

llama.cpp's converter (convert_hf_to_gguf.py, LlamaModel.generate_extra_tensors) stores for each of the D/2
rotary frequencies by how much it is divided: 1 for waves shorter than old/high, the factor for those longer
than old/low, and a blend between. The factor is the largest divisor; the other three parameters are those
that every Llama 3.1 to 3.3 has. They are taken only when they give the very divisors that are stored, so a
model scaled in another way is refused and not bent.
"""

import math
from typing import Any

import numpy as np

TENSOR = "rope_freqs.weight"
LOW, HIGH, OLD_CONTEXT = 1.0, 4.0, 8192
TOLERANCE = 1e-4  # the divisors were computed in float32


def llama3_parameters(divisors: np.ndarray, theta: float) -> dict[str, Any] | None:
    """transformers' rope_parameters for ``divisors`` float32 [D/2], or None when they are not Llama 3's."""
    factor = float(divisors.max())
    if not np.isfinite(divisors).all() or factor < 1:
        return None
    if not np.allclose(divisors, expected_divisors(factor, theta, len(divisors)), rtol=TOLERANCE, atol=0):
        return None
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": LOW,
        "high_freq_factor": HIGH,
        "original_max_position_embeddings": OLD_CONTEXT,
    }


def expected_divisors(factor: float, theta: float, count: int) -> np.ndarray:
    """Float64 [count]: by how much Llama 3.1 slows each rotary frequency."""
    turns = OLD_CONTEXT * theta ** (-np.arange(count) / count) / (2 * math.pi)
    kept = np.clip((turns - LOW) / (HIGH - LOW), 0, 1)
    return 1 / ((1 - kept) / factor + kept)

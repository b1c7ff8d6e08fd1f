"""What is stored in which format: the scheme that recipes produce, dialects write, and the engine obeys."""

from typing import Literal

from fourfold.core.records import Record

# How keys and values may be held. fp8 and fp8-head: E4M3 under one calibrated scale for a layer's keys and
# one for its values, or one for each key head. The MX formats: blocks of 32 features of one head of one
# token, each under its own power of two, so that nothing is calibrated or stored in a checkpoint.
KVCacheFormat = Literal["fp8", "fp8-head", "mxfp8-e4m3", "mxfp4"]


InputTransform = Literal["hadamard", "trained"]
FeedbackGroup = Literal[32, 64, 128]


class LayerScheme(Record):
    """How one linear layer is held and computed. Format names are those of ``fourfold formats``.

    ``input_transform`` says what happens to the input before it is rounded and multiplied: ``hadamard`` is
    the normalised Hadamard matrix of 32 on every run of 32 inputs; ``trained`` is a [32, 32] matrix of the
    checkpoint, ``<module>.input_rotation``. The stored weight holds the inverse.

    ``input_feedback``: inputs are rounded to ``activation`` with feedback inside groups of so many values
    (:mod:`fourfold.kernels.feedback`); None rounds each to nearest.
    """

    weight: str
    scale_rule: str | None = None
    activation: str | None = None
    input_transform: InputTransform | None = None
    input_feedback: FeedbackGroup | None = None


class Quantization(Record):
    """A checkpoint's scheme: module name (no ``.weight``) -> scheme; modules not named are kept."""

    layers: dict[str, LayerScheme] = {}
    kv_cache: KVCacheFormat | None = None

    def layer(self, module: str) -> LayerScheme | None:
        """The scheme of ``module``, or None when it is kept."""
        return self.layers.get(module)

"""What is stored in which format: the scheme that recipes produce, dialects write, and the engine obeys."""

from fourfold.core.records import Record


class LayerScheme(Record):
    """How one linear layer is held and computed. Format names are those of ``fourfold formats``."""

    weight: str
    scale_rule: str | None = None
    activation: str | None = None


class Quantization(Record):
    """A checkpoint's scheme: module name (no ``.weight``) -> scheme; modules not named are kept."""

    layers: dict[str, LayerScheme] = {}
    kv_cache: str | None = None

    def layer(self, module: str) -> LayerScheme | None:
        """The scheme of ``module``, or None when it is kept."""
        return self.layers.get(module)

"""The sizes in a model's config.json, under one name each, and what is wrong with them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from fourfold.core.errors import FourfoldError


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a decoder."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_positions: int
    eps: float
    tied: bool

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Shape":
        """Read a Hugging Face config. Raises FourfoldError naming the key that is missing or unusable."""
        with reading():
            heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
            shape = cls(
                layers=int(config["num_hidden_layers"]),
                hidden=hidden,
                intermediate=int(config["intermediate_size"]),
                heads=heads,
                kv_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or hidden // heads),
                vocabulary=int(config["vocab_size"]),
                max_positions=int(config["max_position_embeddings"]),
                eps=float(config["rms_norm_eps"]),
                tied=bool(config.get("tie_word_embeddings", False)),
            )
        shape.check()
        return shape

    def check(self) -> None:
        """Raises FourfoldError naming a size that no model has."""
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "eps" else field.name != "tied"
            if not least <= value < math.inf:
                raise unusable(f"{field.name} is {value}")
        if self.head_dim % 2:
            raise FourfoldError(
                f"config.json asks for heads of {self.head_dim} features; rotary positions turn pairs, "
                "so the number must be even. Restore the original."
            )
        if self.heads % self.kv_heads:
            raise FourfoldError(
                f"config.json asks for {self.heads} heads over {self.kv_heads} key heads; the engine "
                "computes whole groups only. Restore the original."
            )


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """``count`` experts of ``width`` inner features, of which a token takes ``chosen``."""

    count: int
    chosen: int
    width: int

    @classmethod
    def of(cls, config: dict[str, Any], width: str) -> "ExpertShape":
        """Read a config whose experts are as wide as its key ``width`` says. Raises as ``Shape.of``."""
        with reading():
            # transformers takes the two names for the same
            count = config["num_local_experts" if "num_local_experts" in config else "num_experts"]
            shape = cls(int(count), int(config["num_experts_per_tok"]), int(config[width]))
        if not 1 <= shape.chosen <= shape.count or shape.width < 1:
            raise unusable(f"{shape.chosen} of {shape.count} experts of {shape.width} features")
        return shape


@contextmanager
def reading() -> Iterator[None]:
    """What goes wrong in reading sizes, as FourfoldError."""
    try:
        yield
    except KeyError as error:
        raise FourfoldError(f"config.json has no {error}; restore the model's original config.") from error
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise unusable(str(error)) from error


def unusable(what: str) -> FourfoldError:
    """The error for sizes that no model has."""
    return FourfoldError(f"config.json holds an unusable size ({what}); restore the original.")

"""The little that evaluating needs to know of a model, so that any engine can stand behind it."""

from typing import Protocol

import numpy as np

from fourfold.core.records import ModelCard


class LanguageModel(Protocol):
    """A causal language model that can be asked for the logits of a whole sequence."""

    @property
    def card(self) -> ModelCard:
        """What the model is."""
        ...

    @property
    def max_positions(self) -> int:
        """The longest sequence it takes, in tokens."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without special tokens added."""
        ...

    def logits(self, token_ids: list[int]) -> np.ndarray:
        """Float32 logits [T, V] for a sequence of T token ids, each row predicting the next token."""
        ...


class LayeredModel(LanguageModel, Protocol):
    """A language model that can be run a layer at a time. States are float32 [T, H] of one sequence."""

    @property
    def layer_count(self) -> int:
        """How many decoder layers there are."""
        ...

    def embedded(self, token_ids: list[int]) -> np.ndarray:
        """States before the first layer."""
        ...

    def through(self, hidden: np.ndarray, first: int, end: int) -> np.ndarray:
        """States from before layer ``first`` to before layer ``end``; ``hidden`` stays as it is."""
        ...

    def logits_of(self, hidden: np.ndarray) -> np.ndarray:
        """Float32 logits [T, V] of states that have passed every layer."""
        ...

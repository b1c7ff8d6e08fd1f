"""Where the damage is, layer by layer: what each decoder layer adds on its own, and what builds up.

For windows of the texts, with h the base's states and layer i the model's alone:

    own       mean over tokens of |h' - h| / |h| after layer i, which read the base's states
    KL        mean KL(base || base with layer i replaced): the base goes on from there to its logits
    built up  the same ratio after layer i with all layers the model's

The KL is what a layer costs in the end: early errors may vanish, and late ones go straight into the logits.
The mean is over tokens and not over the whole state: in many models a few tokens hold nearly all its size.

Price: for L layers every window costs L/2 runs of the base besides, so few short windows are taken.
"""

from collections.abc import Callable

import numpy as np

from fourfold.core.errors import FourfoldError
from fourfold.core.protocols import LayeredModel
from fourfold.core.records import LayerError, LayerPicture
from fourfold.evaluate.intervals import mean_of, positive
from fourfold.evaluate.scores import check_finite, score_logits
from fourfold.evaluate.windows import check_window, cut, shared_token_ids

WINDOW_TOKENS = 128
WINDOWS_PER_TEXT = 4
ANOTHER_BASIS = 0.5


def layer_picture(
    model: LayeredModel,
    base: LayeredModel,
    texts: dict[str, str],
    *,
    window_tokens: int = WINDOW_TOKENS,
    windows_per_text: int = WINDOWS_PER_TEXT,
    progress: Callable[[int, int], None],
) -> LayerPicture:
    """The errors of every decoder layer; progress counts windows. Linears are for the caller to add.

    Raises FourfoldError for models whose layers do not correspond.
    """
    check_pair(model, base)
    length = check_window(model, base, window_tokens)
    pieces = [
        cut(name, shared_token_ids(name, text, model, base), length, length * windows_per_text)
        for name, text in texts.items()
    ]
    total, done = sum(map(len, pieces)), 0
    found: list[list[WindowErrors]] = []
    for own in pieces:
        found.append([])
        for token_ids in own:
            found[-1].append(WindowErrors(token_ids, model, base))
            done += 1
            progress(done, total)
    return LayerPicture(
        window_tokens=length,
        windows=total,
        layers=[summarize(found, layer) for layer in range(base.layer_count)],
        linears=[],
    )


class WindowErrors:
    """One window's errors by layer and token: own and built up [L, T], divergence [L, T - 1]."""

    def __init__(self, token_ids: list[int], model: LayeredModel, base: LayeredModel):
        self.own, self.built_up, self.divergence = [], [], []
        count = base.layer_count
        states = [base.embedded(token_ids)]
        for layer in range(count):
            states.append(base.through(states[-1], layer, layer + 1))
        wanted = check_finite(base.logits_of(states[-1]), base.card.name)
        hidden = model.embedded(token_ids)
        check_basis(hidden, states[0], model)
        for layer in range(count):
            hidden = model.through(hidden, layer, layer + 1)
            self.built_up.append(distances(hidden, states[layer + 1]))
            alone = model.through(states[layer], layer, layer + 1)
            self.own.append(distances(alone, states[layer + 1]))
            logits = check_finite(base.logits_of(base.through(alone, layer + 1, count)), model.card.name)
            self.divergence.append(score_logits(token_ids, logits, wanted, model).divergence)


def summarize(texts: list[list[WindowErrors]], layer: int) -> LayerError:
    """The figures of one layer over all windows, given per text."""
    windows = [window for own in texts for window in own]
    return LayerError(
        layer=layer,
        own_error=float(np.mean([window.own[layer] for window in windows])),
        built_up_error=float(np.mean([window.built_up[layer] for window in windows])),
        kl_divergence=positive(mean_of([[window.divergence[layer] for window in own] for own in texts])),
    )


def distances(states: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """|states - wanted| / |wanted| of each token, [T]."""
    size = np.linalg.norm(wanted, axis=-1)
    return np.linalg.norm(states - wanted, axis=-1) / np.maximum(size, np.finfo(np.float32).tiny)


def check_pair(model: LayeredModel, base: LayeredModel) -> None:
    """Raises FourfoldError for models of different depth."""
    if model.layer_count != base.layer_count:
        raise FourfoldError(
            f"'{model.card.name}' has {model.layer_count} layers and its base {base.layer_count}, so layers "
            "cannot be compared one by one. Compare with the model that it was made from."
        )


def check_basis(hidden: np.ndarray, wanted: np.ndarray, model: LayeredModel) -> None:
    """Raises FourfoldError when the states before the first layer are more than a rounding away."""
    if hidden.shape != wanted.shape or float(distances(hidden, wanted).mean()) > ANOTHER_BASIS:
        raise FourfoldError(
            f"The embeddings of '{model.card.name}' are not its base's (resized, rescaled or rotated), so "
            "its layers cannot stand in the base one by one. Evaluate without --layers."
        )

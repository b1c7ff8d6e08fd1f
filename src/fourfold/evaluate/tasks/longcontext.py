"""Loss by how much context stands before a token: long windows, and positions in powers of two.

A model that holds its context badly (in a KV cache of few bits, or with damaged attention) loses more the
more it has read, which a mean over short windows does not show. The difference to the base at each position
is paired: both read the same windows. The models are asked for logits only, so that whatever lies between
keys, values and logits (a quantized KV cache) is in the figures if it is in the logits.

Where a text is too short for two windows, all windows of all texts are taken as one sample (collapsed strata:
intervals then also hold the difference between the texts, and are wide). Price: all logits of a window are in
memory at once, 4 bytes x tokens x vocabulary, for one model at a time.
"""

from dataclasses import dataclass

import numpy as np

from fourfold.core.errors import FourfoldError
from fourfold.core.protocols import LanguageModel
from fourfold.core.records import PositionLoss, TextQuality
from fourfold.evaluate.intervals import exponential, mean_of, perplexity, symmetric
from fourfold.evaluate.scores import token_losses
from fourfold.evaluate.task import Measured, Progress, Task
from fourfold.evaluate.windows import MIN_WINDOWS, check_window, cut, longest_window, shared_token_ids

FIRST_BUCKET_END = 32
SHORTEST_WINDOW = 2 * FIRST_BUCKET_END

METHOD = (
    "Plain windows that do not overlap, at equal distances through each text, each read on its own; every "
    "token but a window's first is scored and counted at its position, the number of tokens before it. "
    "95 % intervals: linearized ratio estimator over windows, texts as strata (one stratum when a text has a "
    "single window), Student quantile. Model and base see the same windows."
)


@dataclass(frozen=True)
class Window:
    """Losses of one window's tokens, [T - 1]; without a base the second is all zero."""

    loss: np.ndarray
    loss_base: np.ndarray


def measure(
    model: LanguageModel,
    base: LanguageModel | None,
    texts: dict[str, str],
    window_tokens: int | None,
    max_tokens_per_text: int | None,
    progress: Progress,
) -> Measured:
    """Loss over all texts, per text where it has two windows, and by position; progress counts windows."""
    ids = {name: shared_token_ids(name, text, model, base) for name, text in texts.items()}
    if window_tokens is None:
        window_tokens = fitting_window(longest_window(model, base), list(ids.values()))
    length = check_window(model, base, window_tokens)
    pieces = {name: cut(name, own, length, max_tokens_per_text, least=1) for name, own in ids.items()}
    total, done = sum(map(len, pieces.values())), 0
    if total < MIN_WINDOWS:
        raise FourfoldError(
            f"The text holds a single window of {length} tokens: no interval can be given. Use more or "
            "longer text, or a smaller --window-tokens."
        )
    windows: dict[str, list[Window]] = {name: [] for name in pieces}
    for name, own in pieces.items():
        for piece in own:
            loss = token_losses(piece, model)
            windows[name].append(
                Window(loss, np.zeros_like(loss) if base is None else token_losses(piece, base))
            )
            done += 1
            progress(done, total)
    return result(windows, base is not None, length)


def fitting_window(longest: int, texts: list[list[int]]) -> int:
    """The model's longest window, or the largest power of two that every text holds (two, if it is alone)."""
    shortest = min(map(len, texts)) // (1 if len(texts) > 1 else MIN_WINDOWS)
    if shortest >= longest:
        return longest
    if shortest < SHORTEST_WINDOW:
        raise FourfoldError(
            f"A text holds windows of {shortest} tokens at most, which is no long context. Use longer text."
        )
    return min(1 << (shortest.bit_length() - 1), longest)


def result(windows: dict[str, list[Window]], has_base: bool, window_tokens: int) -> Measured:
    """The figures of all windows, given per text."""
    texts = list(windows.values())
    if min(map(len, texts)) < MIN_WINDOWS:
        texts = [[window for own in texts for window in own]]
    return Measured(
        overall=summarize(texts, has_base),
        texts={n: summarize([own], has_base) for n, own in windows.items() if len(own) >= MIN_WINDOWS},
        window_tokens=window_tokens,
        positions=[at(texts, has_base, *bucket) for bucket in buckets(window_tokens)],
    )


def buckets(window_tokens: int) -> list[tuple[int, int]]:
    """Positions [start, end): 1 to 31, then from each power of two to the next, to the window's end."""
    ends = [FIRST_BUCKET_END]
    while ends[-1] < window_tokens:
        ends.append(2 * ends[-1])
    starts = [1, *ends[:-1]]
    return [(start, min(end, window_tokens)) for start, end in zip(starts, ends, strict=True)]


def summarize(texts: list[list[Window]], has_base: bool) -> TextQuality:
    """Perplexity over whole windows."""
    quality = TextQuality(
        tokens=sum(len(w.loss) for own in texts for w in own),
        windows=sum(map(len, texts)),
        perplexity=perplexity(mean_of([[w.loss for w in own] for own in texts])),
    )
    if not has_base:
        return quality
    ratio = exponential(mean_of([[w.loss - w.loss_base for w in own] for own in texts]))
    base = perplexity(mean_of([[w.loss_base for w in own] for own in texts]))
    return quality.model_copy(update={"perplexity_base": base, "perplexity_ratio": ratio})


def at(texts: list[list[Window]], has_base: bool, start: int, end: int) -> PositionLoss:
    """The figures where ``start`` to ``end - 1`` tokens stand before; position p is element p - 1."""
    here = slice(start - 1, end - 1)
    found = PositionLoss(
        start=start,
        end=end,
        tokens=sum(len(w.loss[here]) for own in texts for w in own),
        loss=symmetric(mean_of([[w.loss[here] for w in own] for own in texts]), least=0.0),
    )
    if not has_base:
        return found
    base = symmetric(mean_of([[w.loss_base[here] for w in own] for own in texts]), least=0.0)
    increase = symmetric(mean_of([[(w.loss - w.loss_base)[here] for w in own] for own in texts]))
    return found.model_copy(update={"loss_base": base, "loss_increase": increase})


TASK = Task(run=measure, method=METHOD, gates=("perplexity", "perplexity_ratio"), max_tokens_per_text=None)

"""Perplexity on plain text, how close the model's next-token distribution stays to the base's, and the loss
on rare tokens."""

from dataclasses import dataclass

import numpy as np

from fourfold.core.protocols import LanguageModel
from fourfold.core.records import TextQuality
from fourfold.evaluate.intervals import exponential, mean_of, perplexity, positive, share, symmetric
from fourfold.evaluate.rarity import TAIL, rarity_ranks
from fourfold.evaluate.scores import TokenScores, score_window
from fourfold.evaluate.task import Measured, Progress, Task
from fourfold.evaluate.windows import check_window, cut, shared_token_ids

DEFAULT_WINDOW_TOKENS = 512
DEFAULT_TOKENS_PER_TEXT = 4096

METHOD = (
    "Plain windows that do not overlap, at equal distances through each text, each read on its own; every "
    "token but a window's first is scored. 95 % intervals: linearized ratio estimator over windows, texts as "
    "strata, Student quantile; top-1 agreement by Korn and Graubard. Model and base see the same windows. "
    "Tail: the kinds of tokens that are rarest in the texts (all, read whole), a tenth of the scored."
)


@dataclass(frozen=True)
class Window:
    """The scores of one window's tokens, and which of them are in the tail."""

    scores: TokenScores
    tail: np.ndarray


def measure(
    model: LanguageModel,
    base: LanguageModel | None,
    texts: dict[str, str],
    window_tokens: int | None,
    max_tokens_per_text: int | None,
    progress: Progress,
) -> Measured:
    """Quality over all texts and per text; ``progress(done, total)`` counts windows."""
    length = check_window(model, base, DEFAULT_WINDOW_TOKENS if window_tokens is None else window_tokens)
    ids = {name: shared_token_ids(name, text, model, base) for name, text in texts.items()}
    pieces = {name: cut(name, own, length, max_tokens_per_text) for name, own in ids.items()}
    windows = score_all(model, base, pieces, list(ids.values()), progress)
    per_text = {name: summarize([own], base is not None) for name, own in windows.items()}
    return Measured(summarize(list(windows.values()), base is not None), per_text, length)


def score_all(
    model: LanguageModel,
    base: LanguageModel | None,
    pieces: dict[str, list[list[int]]],
    texts: list[list[int]],
    progress: Progress,
) -> dict[str, list[Window]]:
    """Score every piece; ``texts`` are the whole texts, which say what is rare."""
    scored = np.concatenate([np.array(ids[1:]) for own in pieces.values() for ids in own])
    total, place = sum(map(len, pieces.values())), 0
    tail = (rarity_ranks(scored, texts) < TAIL).reshape(total, -1)
    windows: dict[str, list[Window]] = {name: [] for name in pieces}
    for name, own in pieces.items():
        for ids in own:
            windows[name].append(Window(score_window(ids, model, base), tail[place]))
            place += 1
            progress(place, total)
    return windows


def summarize(texts: list[list[Window]], has_base: bool) -> TextQuality:
    """The figures of one or several texts, each given as its windows."""
    scores = [[window.scores for window in windows] for windows in texts]
    quality = TextQuality(
        tokens=sum(len(s.loss) for own in scores for s in own),
        windows=sum(map(len, texts)),
        perplexity=perplexity(mean_of([[s.loss for s in own] for own in scores])),
        **summarize_tail(texts, has_base),
    )
    if not has_base:
        return quality
    return quality.model_copy(
        update={
            "perplexity_base": perplexity(mean_of([[s.loss_base for s in own] for own in scores])),
            "perplexity_ratio": exponential(mean_of([[s.loss - s.loss_base for s in own] for own in scores])),
            "kl_divergence": positive(mean_of([[s.divergence for s in own] for own in scores])),
            "top1_agreement": share(mean_of([[s.agreed for s in own] for own in scores])),
        }
    )


def summarize_tail(texts: list[list[Window]], has_base: bool) -> dict:
    """The figures on rare tokens; of a text without any, only that there are none."""
    count = sum(int(window.tail.sum()) for windows in texts for window in windows)
    if not count:
        return {"tail_tokens": 0}
    loss = [[window.scores.loss[window.tail] for window in windows] for windows in texts]
    figures = {"tail_tokens": count, "tail_loss": symmetric(mean_of(loss), least=0.0)}
    if has_base:
        base = [[window.scores.loss_base[window.tail] for window in windows] for windows in texts]
        increase = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(loss, base, strict=True)]
        figures["tail_loss_base"] = symmetric(mean_of(base), least=0.0)
        figures["tail_loss_increase"] = symmetric(mean_of(increase))
    return figures


TASK = Task(
    run=measure,
    method=METHOD,
    gates=(
        "perplexity",
        "perplexity_ratio",
        "kl_divergence",
        "top1_agreement",
        "tail_loss",
        "tail_loss_increase",
    ),
    max_tokens_per_text=DEFAULT_TOKENS_PER_TEXT,
)

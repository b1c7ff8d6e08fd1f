"""Perplexity on plain text, and how close the model's next-token distribution stays to the base's."""

from collections.abc import Callable

import numpy as np

from fourfold.core.errors import FourfoldError, UsageError
from fourfold.core.protocols import LanguageModel
from fourfold.core.records import TextQuality
from fourfold.evaluate.intervals import Mean, exponential, mean_per_token, perplexity, positive, share
from fourfold.evaluate.scores import WindowScore, score_window
from fourfold.evaluate.task import Task
from fourfold.evaluate.windows import cut

METHOD = (
    "Plain windows that do not overlap, at equal distances through each text, each read on its own; every "
    "token but a window's first is scored. 95 % intervals: linearized ratio estimator over windows, texts as "
    "strata, Student quantile; top-1 agreement by Korn and Graubard. Model and base see the same windows."
)


def measure(
    model: LanguageModel,
    base: LanguageModel | None,
    texts: dict[str, str],
    window_tokens: int,
    max_tokens_per_text: int | None,
    progress: Callable[[int, int], None],
) -> tuple[TextQuality, dict[str, TextQuality]]:
    """Quality over all texts and per text; ``progress(done, total)`` counts windows."""
    _check_window(model, base, window_tokens)
    windows = {
        name: cut(name, shared_token_ids(name, text, model, base), window_tokens, max_tokens_per_text)
        for name, text in texts.items()
    }
    total, done = sum(map(len, windows.values())), 0
    scores: dict[str, list[WindowScore]] = {name: [] for name in windows}
    for name, pieces in windows.items():
        for piece in pieces:
            scores[name].append(score_window(piece, model, base))
            done += 1
            progress(done, total)
    per_text = {name: summarize([s], base is not None) for name, s in scores.items()}
    return summarize(list(scores.values()), base is not None), per_text


def summarize(texts: list[list[WindowScore]], has_base: bool) -> TextQuality:
    """The figures of one or several texts, each given as the scores of its windows."""
    tokens = [np.array([w.tokens for w in windows]) for windows in texts]

    def mean(field: Callable[[WindowScore], float]) -> Mean:
        return mean_per_token([np.array([field(w) for w in windows], float) for windows in texts], tokens)

    quality = TextQuality(
        tokens=int(sum(n.sum() for n in tokens)),
        windows=sum(map(len, texts)),
        perplexity=perplexity(mean(lambda w: w.loss)),
    )
    if not has_base:
        return quality
    return quality.model_copy(
        update={
            "perplexity_base": perplexity(mean(lambda w: w.loss_base)),
            "perplexity_ratio": exponential(mean(lambda w: w.loss - w.loss_base)),
            "kl_divergence": positive(mean(lambda w: w.divergence)),
            "top1_agreement": share(mean(lambda w: w.agreed)),
        }
    )


def shared_token_ids(name: str, text: str, model: LanguageModel, base: LanguageModel | None) -> list[int]:
    """The text's token ids, which must be the same for both models, or logits could not be compared."""
    ids = model.encode(text)
    if base is not None and base.encode(text) != ids:
        raise FourfoldError(
            f"'{model.card.name}' and its base '{base.card.name}' cut text '{name}' into different tokens, "
            "so their predictions cannot be compared. Compare with the model that it was made from."
        )
    return ids


def _check_window(model: LanguageModel, base: LanguageModel | None, window_tokens: int) -> None:
    longest = min(m.max_positions for m in (model, base) if m is not None)
    if not 2 <= window_tokens <= longest:
        raise UsageError(
            f"--window-tokens {window_tokens} is out of range: a window holds at least 2 tokens, and the "
            f"model takes at most {longest}."
        )


TASK = Task(run=measure, method=METHOD)

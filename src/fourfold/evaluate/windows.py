"""Cutting a text's tokens into windows: plain, equal, not overlapping, each read by the model on its own.

Price: the first tokens of a window are predicted from little context, so perplexity is somewhat above what a
sliding window would give. In return every token costs one forward pass and windows share no token, which the
intervals rest on. The first token of a window is context only. A tail shorter than a window is left out.
"""

from fourfold.core.errors import FourfoldError, UsageError
from fourfold.core.protocols import LanguageModel

MIN_WINDOWS = 2


def check_window(model: LanguageModel, base: LanguageModel | None, window_tokens: int) -> int:
    """``window_tokens``, if both models can read so many. Raises UsageError."""
    longest = longest_window(model, base)
    if not 2 <= window_tokens <= longest:
        raise UsageError(
            f"--window-tokens {window_tokens} is out of range: a window holds at least 2 tokens, and the "
            f"model takes at most {longest}."
        )
    return window_tokens


def longest_window(model: LanguageModel, base: LanguageModel | None) -> int:
    """The longest sequence that both models take."""
    return min(m.max_positions for m in (model, base) if m is not None)


def shared_token_ids(name: str, text: str, model: LanguageModel, base: LanguageModel | None) -> list[int]:
    """The text's token ids, which must be the same for both models, or logits could not be compared."""
    ids = model.encode(text)
    if base is not None and base.encode(text) != ids:
        raise FourfoldError(
            f"'{model.card.name}' and its base '{base.card.name}' cut text '{name}' into different tokens, "
            "so their predictions cannot be compared. Compare with the model that it was made from."
        )
    return ids


def cut(
    name: str, token_ids: list[int], window_tokens: int, max_tokens: int | None, least: int = MIN_WINDOWS
) -> list[list[int]]:
    """Windows of exactly ``window_tokens`` ids, at most ``max_tokens`` ids in all.

    Where a text has more windows than are wanted, they are taken at equal distances through the whole of it.
    Raises FourfoldError for a text with fewer than ``least`` windows: one has no spread, thus no interval.
    """
    available = len(token_ids) // window_tokens
    if available < least:
        raise FourfoldError(
            f"Text '{name}' has {len(token_ids)} tokens, which is fewer than {least} windows of "
            f"{window_tokens}: no interval can be given. Use a longer text, or a smaller --window-tokens."
        )
    wanted = available if max_tokens is None else max(least, max_tokens // window_tokens)
    wanted = min(wanted, available)
    starts = [i * available // wanted * window_tokens for i in range(wanted)]
    return [token_ids[start : start + window_tokens] for start in starts]

"""Cutting a text's tokens into windows: plain, equal, not overlapping, each read by the model on its own.

Price: the first tokens of a window are predicted from little context, so perplexity is somewhat above what a
sliding window would give. In return every token costs one forward pass and windows share no token, which the
intervals rest on. The first token of a window is context only. A tail shorter than a window is left out.
"""

from fourfold.core.errors import FourfoldError

MIN_WINDOWS = 2


def cut(name: str, token_ids: list[int], window_tokens: int, max_tokens: int | None) -> list[list[int]]:
    """Windows of exactly ``window_tokens`` ids, at most ``max_tokens`` ids in all.

    Where a text has more windows than are wanted, they are taken at equal distances through the whole of it.
    Raises FourfoldError for a text with fewer than two windows: one window has no spread, thus no interval.
    """
    available = len(token_ids) // window_tokens
    if available < MIN_WINDOWS:
        raise FourfoldError(
            f"Text '{name}' has {len(token_ids)} tokens, which is fewer than {MIN_WINDOWS} windows of "
            f"{window_tokens}: no interval can be given. Use a longer text, or a smaller --window-tokens."
        )
    wanted = available if max_tokens is None else max(MIN_WINDOWS, max_tokens // window_tokens)
    wanted = min(wanted, available)
    starts = [i * available // wanted * window_tokens for i in range(wanted)]
    return [token_ids[start : start + window_tokens] for start in starts]

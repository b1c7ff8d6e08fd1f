"""Which tokens are rare, so that the loss on them can be told apart: few bits hurt rare tokens first.

The rarity of a token is how seldom it stands in the evaluated texts, all of them together and read whole; of
two that are equally seldom, the one with the larger id is rarer, because byte-pair tokenizers number their
merges from the commonest on. A scored token's rank, in 0..1, is the share of scored tokens of rarer kinds and
half of its own kind; the tail is rank < 0.1: whole kinds, rarest first, as near to a tenth as they come.

This needs nothing but the texts and the tokenizer: every model with that tokenizer is judged on the same
tokens, whatever its base. Price: a few thousand tokens of text know little of what is rare in the language;
most of such a tail is tokens that occur once.
"""

from collections.abc import Iterable

import numpy as np

TAIL = 0.1


def rarity_ranks(scored: np.ndarray, texts: Iterable[list[int]]) -> np.ndarray:
    """The rank in 0..1 of each of the ``scored`` token ids [N], which all stand in ``texts``."""
    counts = np.bincount(np.concatenate([np.asarray(ids, dtype=np.int64) for ids in texts]))
    kinds, where, scored_of_kind = np.unique(scored, return_inverse=True, return_counts=True)
    order = np.lexsort((-kinds, counts[kinds]))
    rarer = np.empty(len(kinds), dtype=np.int64)
    rarer[order] = np.cumsum(scored_of_kind[order]) - scored_of_kind[order]
    return (rarer + scored_of_kind / 2)[where] / len(scored)

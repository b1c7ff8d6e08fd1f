"""Speculative decoding by look-up: what followed the last tokens before, may follow them again.

There is no second model. The last n tokens are looked up in prompt and output, for the largest n of a range
(3 down to 2) for which they have stood there before, and the tokens that followed then are the draft. The
step computes the sequence's next position and one more for each draft token, and ``sampling.choose`` takes
the token of each position as it would without a draft, up to the first that differs from it. For a proposal
without chance of its own that is the exact rejection rule (Leviathan et al. 2023, arXiv:2211.17192): draft
token x is accepted with probability p(x), and otherwise the token is one of p without x, renormalised. Each
position has its own random number, so equal seeds even give equal tokens with and without drafts.

When to propose. A draft token costs a row of the step, accepted or not. With B sequences in a step that costs
as much as ``STEP_ROWS`` + B rows, a row pays from a chance of B / (``STEP_ROWS`` + B) on: one in four alone,
three in four beside seven others. The chance of a draft token is the product of the rates at which matches
as long as the one it needs have come true so far: an exponential average for each length, over this
request's own tokens. Every token is held against what the look-up would have said, proposed or not, so
learning costs no row: a text that does not repeat itself soon stops having drafts, and one that begins to
gets them again. The price is about 2 us and an entry of an index for each n and token.
"""

STEP_ROWS = 3.0  # what a step costs beside its rows, in rows: 3 to 7 were measured; the least costs least
LONGEST_MATCH = 8  # longer matches are counted as this long
FIRST_RATES = [0.0, 0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8]  # for a match of 0, 1, 2... tokens
MEMORY = 1 / 16


class Lookup:
    """The n-grams of one sequence's live token list, where each stood last, and how well they foretell."""

    def __init__(self, tokens: list[int], sizes: range):
        self._tokens, self._sizes = tokens, sizes
        self._after: dict[tuple[int, ...], int] = {}
        for n in self._sizes:
            grams = zip(*(tokens[i:-1] for i in range(n)), strict=False)
            self._after.update(zip(grams, range(n, len(tokens)), strict=False))
        self._known = len(tokens)
        self._next = self._length = 0
        self._rates = list(FIRST_RATES)
        self._find(len(tokens))

    def propose(self, most: int, chance: float) -> list[int]:
        """Up to ``most`` tokens that may come next, as long as the whole draft's chance is ``chance``."""
        self._learn()
        worth, likely, length = 0, 1.0, self._length
        while length and worth < most:
            likely *= self._rates[min(length, LONGEST_MATCH)]
            if likely < chance:
                break
            worth, length = worth + 1, length + 1
        period = len(self._tokens) - self._next  # a draft that reaches the end goes on with itself
        return [self._tokens[self._next + i % period] for i in range(worth)]

    def _learn(self) -> None:
        """Take in the tokens that have come since: did they follow, and what do they foretell?"""
        for at in range(self._known, len(self._tokens)):
            if self._length:
                came = self._tokens[self._next] == self._tokens[at]
                length = min(self._length, LONGEST_MATCH)
                self._rates[length] += (came - self._rates[length]) * MEMORY
                self._next, self._length = (self._next + 1, self._length + 1) if came else (0, 0)
            self._find(at + 1)
        self._known = len(self._tokens)

    def _find(self, end: int) -> None:
        """Index the n-grams that end before ``end``; where a longer one than now matches stood, follow it."""
        for n in self._sizes:
            if n > end:
                break
            gram = tuple(self._tokens[end - n : end])
            before = self._after.get(gram)
            if before is not None and n > self._length:
                self._next, self._length = before, n
            self._after[gram] = end


def worthwhile(sequences: int) -> float:
    """The chance from which a draft token pays in a step of so many sequences."""
    return sequences / (STEP_ROWS + sequences)

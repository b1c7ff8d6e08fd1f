"""One request on its way through the engine: its tokens, its KV blocks, its text, and when it ends."""

from dataclasses import dataclass, field

from fourfold.engine.kv_cache import BlockTable
from fourfold.engine.requests import FinishReason, Request, TokenOutput
from fourfold.engine.sampling import Choice, SamplingState
from fourfold.engine.speculation import Lookup
from fourfold.engine.tokenizer import TextStream


class StopText:
    """Holds back text that may be the beginning of a stop string, so that no part of one is ever emitted."""

    def __init__(self, stops: list[str]):
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that may be shown now, and whether a stop string was reached; what follows it is dropped."""
        if not self._stops:
            return text, False
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        held = max(map(self._overlap, self._stops, [text] * len(self._stops)))
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """What was held back, once nothing can follow."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(stop: str, text: str) -> int:
        """Length of the longest end of ``text`` that begins ``stop``."""
        longest = min(len(stop) - 1, len(text))
        return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(slots=True, eq=False)
class Sequence:
    """A request with its state. ``tokens`` is prompt and output; the first ``computed`` have their KV."""

    request: Request
    table: BlockTable
    sampling: SamplingState
    stream: TextStream
    end_tokens: set[int]
    length_limit: int
    ngrams: range  # sizes of what drafts are looked up by
    tokens: list[int] = field(init=False)
    computed: int = 0
    cached: int | None = None  # prompt tokens reused at the first admission; a preempted one keeps its count
    stop_text: StopText = field(init=False)
    finished: bool = False
    lookup: Lookup | None = None  # made for the first draft that is asked for

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_token_ids)
        self.stop_text = StopText(self.request.sampling.stop)

    def propose(self, most: int, chance: float) -> list[int]:
        """A draft of up to ``most`` tokens, each of which comes with at least ``chance``."""
        if self.lookup is None:
            self.lookup = Lookup(self.tokens, self.ngrams)
        room = self.length_limit - len(self.tokens) - 1  # a step adds one token more than its draft
        return self.lookup.propose(min(most, room), chance)

    def accept(self, choices: list[Choice]) -> list[TokenOutput]:
        """Append chosen tokens up to where they end the sequence. Returns what to tell the caller."""
        outputs = []
        for choice in choices:
            self.tokens.append(choice.token_id)
            text, reason = self._advance(choice.token_id)
            outputs.append(
                TokenOutput(
                    self.request.request_id,
                    choice.token_id,
                    text,
                    choice.logprob,
                    choice.top_logprobs,
                    reason,
                    self.cached or 0,
                )
            )
            if reason is not None:
                self.finished = True
                break
        return outputs

    def _advance(self, token_id: int) -> tuple[str, FinishReason | None]:
        may_stop = len(self.tokens) - len(self.request.prompt_token_ids) >= self.request.sampling.min_tokens
        if may_stop and token_id in self.end_tokens:
            return self.stop_text.flush(), "stop"
        text = self.stream.push(token_id)
        stopped = False
        if may_stop:
            text, stopped = self.stop_text.push(text)
        if stopped:
            return text, "stop"
        if len(self.tokens) >= self.length_limit:
            return text + self.stop_text.flush(), "length"
        return text, None

"""The two shapes of answers: text completions and chat completions, whole or as chunks.

A chunk carries exactly one token, also when no text became printable with it: clients that time tokens count
chunks. The chat role travels in the first token's chunk, and the finish reason in the last token's.
Source: OpenAI API reference, objects ``text_completion``, ``chat.completion`` and ``chat.completion.chunk``.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from fourfold.engine import TokenOutput

DecodeToken = Callable[[int], str]
Json = dict[str, Any]


class Shape(Protocol):
    """How choices look in one endpoint's answers."""

    id_prefix: str
    object_name: str
    chunk_name: str

    def choice(self, index: int, outputs: Sequence[TokenOutput]) -> Json:
        """A finished choice."""
        ...

    def chunk(self, index: int, output: TokenOutput, first: bool, offset: int) -> Json:
        """One token of a choice; ``offset`` is the number of characters before it."""
        ...


class CompletionShape:
    """``text_completion``: the same object name whole and streamed."""

    id_prefix, object_name, chunk_name = "cmpl-", "text_completion", "text_completion"

    def __init__(self, decode: DecodeToken):
        self.decode = decode

    def choice(self, index: int, outputs: Sequence[TokenOutput], offset: int = 0) -> Json:
        """A finished choice."""
        return {
            "index": index,
            "text": "".join(o.text for o in outputs),
            "logprobs": self.logprobs(outputs, offset),
            "finish_reason": outputs[-1].finish_reason,
        }

    def chunk(self, index: int, output: TokenOutput, first: bool, offset: int) -> Json:
        """One token of a choice."""
        logprobs = None if output.logprob is None else self.logprobs([output], offset)
        reason = output.finish_reason
        return {"index": index, "text": output.text, "logprobs": logprobs, "finish_reason": reason}

    def logprobs(self, outputs: Sequence[TokenOutput], offset: int) -> Json | None:
        """Four parallel lists over the tokens; None when none were asked for. An echoed prompt's first token
        has none, as OpenAI has it."""
        if outputs[-1].logprob is None:
            return None
        offsets = []
        for output in outputs:
            offsets.append(offset)
            offset += len(output.text)
        return {
            "tokens": [self.decode(o.token_id) for o in outputs],
            "token_logprobs": [None if o.logprob is None else finite(o.logprob) for o in outputs],
            "top_logprobs": [
                None if o.top_logprobs is None else self.by_text(o.top_logprobs) for o in outputs
            ],
            "text_offset": offsets,
        }

    def by_text(self, top: list[tuple[int, float]]) -> dict[str, float]:
        """Likeliest tokens by their texts; of tokens with one text (pieces of characters) the likeliest."""
        return {self.decode(token): finite(value) for token, value in reversed(top)}


class ChatShape:
    """``chat.completion`` and ``chat.completion.chunk``."""

    id_prefix, object_name, chunk_name = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, decode: DecodeToken):
        self.decode = decode

    def choice(self, index: int, outputs: Sequence[TokenOutput]) -> Json:
        """A finished choice."""
        message = {"role": "assistant", "content": "".join(o.text for o in outputs), "refusal": None}
        return {"index": index, "message": message} | self.ending(outputs)

    def chunk(self, index: int, output: TokenOutput, first: bool, offset: int) -> Json:
        """One token of a choice."""
        role = {"role": "assistant"} if first else {}
        return {"index": index, "delta": role | {"content": output.text}} | self.ending([output])

    def ending(self, outputs: Sequence[TokenOutput]) -> Json:
        """What whole choices and chunks have in common."""
        asked = outputs[0].logprob is not None
        content = [self.logprob(o) for o in outputs] if asked else None
        return {
            "logprobs": {"content": content, "refusal": None} if asked else None,
            "finish_reason": outputs[-1].finish_reason,
        }

    def logprob(self, output: TokenOutput) -> Json:
        """One token with its likeliest alternatives."""
        top = [self.token(token, value) for token, value in output.top_logprobs or []]
        return self.token(output.token_id, output.logprob) | {"top_logprobs": top}

    def token(self, token_id: int, logprob: float | None) -> Json:
        """A token's text, bytes and logprob."""
        text = self.decode(token_id)
        return {"token": text, "logprob": finite(logprob), "bytes": list(text.encode())}


def finite(logprob: float | None) -> float:
    """JSON has no infinity; OpenAI gives -9999 for a token of probability zero."""
    return max(logprob, -9999.0) if logprob is not None else -9999.0


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    """Exact token counts of a request, all its choices together; each prompt is counted once."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def final_usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Json:
    """The counts of a finished answer; ``cached_tokens`` of the prompts were found in the prefix cache."""
    details = {"prompt_tokens_details": {"cached_tokens": cached_tokens}}
    return usage(prompt_tokens, completion_tokens) | details

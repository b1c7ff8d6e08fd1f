"""Reading a server-sent stream of completion chunks: how many tokens had arrived, and when.

Everything that can wait until the stream has ended does, because the client must not slow down what it
measures: while bytes arrive only lines are split, chunks parsed and counts noted.

How many tokens a chunk brought is known exactly where the server keeps a running count (``usage`` in every
chunk: vLLM, SGLang, Fourfold; ``timings.predicted_n``: llama.cpp). Otherwise one chunk with a choice counts
as one token; when the final usage then disagrees, the difference is spread evenly over the chunks and the
reading says so. First and last token keep their true times either way.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import from_json


@dataclass
class StreamReading:
    """What has been read so far. ``arrivals`` holds (seconds, tokens that came at that moment)."""

    arrivals: list[tuple[float, int]] = field(default_factory=list)
    counted: int = 0
    running_count: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int = 0
    error: str | None = None
    finished: bool = False
    estimated: bool = False
    _rest: bytes = b""

    def feed(self, data: bytes, at_s: float) -> None:
        """Take the bytes that arrived at ``at_s``, in whatever pieces the network made of them."""
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), at_s)

    def _event(self, payload: bytes, at_s: float) -> None:
        if payload == b"[DONE]":
            self.finished = True
            return
        try:
            event = from_json(payload)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            self.error = self.error or f"a chunk is not a JSON object: {payload[:80]!r}"
        elif event.get("error"):
            self.error = self.error or f"the server ended the stream: {error_text(event)}"
        else:
            self._count(event, at_s)

    def _count(self, event: dict[str, Any], at_s: float) -> None:
        usage, choices = event.get("usage"), event.get("choices")
        total = (event.get("timings") or {}).get("predicted_n")
        if usage:
            total = usage.get("completion_tokens", total)
            self._take_usage(usage)
        if total is not None and choices and not choices[0].get("finish_reason"):
            self.running_count = True
        if self.running_count and total is not None:
            new = total - self.counted
        else:
            new = int(bool(choices) and brings_token(choices[0]))
        if new > 0:
            self.arrivals.append((at_s, new))
            self.counted += new

    def _take_usage(self, usage: dict[str, Any]) -> None:
        self.prompt_tokens = usage.get("prompt_tokens", self.prompt_tokens)
        self.completion_tokens = usage.get("completion_tokens", self.completion_tokens)
        details = usage.get("prompt_tokens_details") or {}
        self.cached_tokens = max(self.cached_tokens, details.get("cached_tokens") or 0)

    def token_times_s(self) -> list[float]:
        """One time per token. Sets ``estimated`` when chunks and the server's own count disagree."""
        total = self.counted if self.completion_tokens is None else self.completion_tokens
        chunks = [at for at, _ in self.arrivals]
        if total == self.counted or not chunks:
            return [at for at, tokens in self.arrivals for _ in range(tokens)]
        self.estimated = True
        if total == 1:
            return chunks[:1]
        last = len(chunks) - 1
        return [chunks[round(i * last / (total - 1))] for i in range(total)]


def brings_token(choice: dict[str, Any]) -> bool:
    """Whether a chunk without a count carries a token: only a closing chunk may be empty and bring none."""
    return bool(choice.get("text")) or not choice.get("finish_reason")


def error_text(body: Any) -> str:
    """The sentence inside the several shapes of error that servers send."""
    if isinstance(body, dict):
        for key in ("error", "message", "detail"):
            if body.get(key):
                return error_text(body[key])
    return body if isinstance(body, str) else json.dumps(body)

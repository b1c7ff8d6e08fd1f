"""One HTTP request being answered: from token streams to a whole answer or to events."""

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from fourfold.engine import TokenOutput
from fourfold.server.errors import ApiError
from fourfold.server.metrics import LatencyWatch
from fourfold.server.schemas import StreamOptions
from fourfold.server.shapes import Shape, final_usage, usage
from fourfold.server.sse import DONE, event
from fourfold.server.streams import TokenStream


@dataclass
class Generation:
    """The choices of one request on their way: ``n`` of each prompt; prompt tokens count each prompt once.

    ``echoes`` are the prompts as outputs, one list for each, where the answer is to begin with them.
    """

    id: str
    model: str
    shape: Shape
    prompt_tokens: int
    n: int
    stream: TokenStream
    watch: LatencyWatch
    created: int = field(default_factory=lambda: int(time.time()))
    echoes: list[list[TokenOutput]] = field(default_factory=list)
    completion_tokens: int = 0
    cached_tokens: dict[int, int] = field(default_factory=dict)

    def take(self, index: int, output: TokenOutput) -> None:
        """Count and time a token that has arrived."""
        self.completion_tokens += 1
        if self.watch.token(index):
            self.cached_tokens[index] = output.cached_tokens

    def usage(self) -> dict[str, Any]:
        """Token counts of the whole answer."""
        cached = sum(count for index, count in self.cached_tokens.items() if index % self.n == 0)
        return final_usage(self.prompt_tokens, self.completion_tokens, cached)

    async def whole(self) -> dict[str, Any]:
        """The complete answer. Raises ApiError when the engine refuses or fails."""
        before = self.echoes or [[] for _ in self.stream.requests[:: self.n]]
        choices = [list(before[index // self.n]) for index in range(len(self.stream.requests))]
        try:
            async for batch in self.stream:
                for index, output in batch:
                    self.take(index, output)
                    choices[index].append(output)
        finally:
            self.stream.close()
        return self.head(self.shape.object_name) | {
            "choices": [self.shape.choice(i, outputs) for i, outputs in enumerate(choices)],
            "usage": self.usage(),
        }

    async def events(self, options: StreamOptions) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events, one for each token, the last with ``DONE`` behind it.

        Raises ApiError only before the first one.
        """
        head = self.head(self.shape.chunk_name)
        offsets: dict[int, int] = {}
        try:
            async for batch in self.stream:
                chunks = []
                for index, output in batch:
                    self.take(index, output)
                    offset = offsets.get(index)
                    choice = self.shape.chunk(index, output, offset is None, offset or 0)
                    offsets[index] = (offset or 0) + len(output.text)
                    chunks.append(event(head | {"choices": [choice]} | self.chunk_usage(options)))
                if self.stream.finished:
                    if options.include_usage:
                        chunks.append(event(head | {"choices": [], "usage": self.usage()}))
                    chunks.append(DONE)
                yield b"".join(chunks)
        except ApiError as error:
            if not offsets:
                raise
            yield event(error.body()) + DONE
        finally:
            self.stream.close()

    def chunk_usage(self, options: StreamOptions) -> dict[str, Any]:
        """The usage key of a token's chunk: counts, null, or no key at all."""
        if options.continuous_usage_stats:
            return {"usage": usage(self.prompt_tokens, self.completion_tokens)}
        return {"usage": None} if options.include_usage else {}

    def head(self, name: str) -> dict[str, Any]:
        """The keys that every object of this answer begins with."""
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}

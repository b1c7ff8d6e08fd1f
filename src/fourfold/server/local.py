"""An engine in this process, for the terminal: one request at a time, stepped by the caller.

``fourfold generate`` and ``fourfold chat`` need neither threads nor HTTP, so they pay for neither.
"""

import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Literal, Protocol, Self

from pydantic import Field

from fourfold.core.errors import FourfoldError
from fourfold.core.records import ModelCard, Record
from fourfold.engine import Engine, Request, SamplingParams, TokenOutput


class Chat(Protocol):
    """Something that answers conversations, here or behind a URL."""

    name: str

    def reply(self, messages: list[dict[str, str]]) -> Iterator[str]:
        """The next turn, piece by piece. KeyboardInterrupt ends the answer and leaves the chat usable."""
        ...


class LocalChat:
    """Answers with an engine in this process."""

    def __init__(self, engine: Engine, sampling: SamplingParams):
        self.engine, self.sampling = engine, sampling
        self.name = engine.card.name

    def reply(self, messages: list[dict[str, str]]) -> Iterator[str]:
        """The next turn, token by token, cut where the context is full.

        Raises FourfoldError when the conversation alone does not fit.
        """
        prompt = self.engine.tokenizer.apply_chat_template(messages)
        room = max(self.engine.max_request_tokens - len(prompt), 1)
        longest = min(self.sampling.max_tokens or room, room)
        sampling = self.sampling.model_copy(update={"max_tokens": longest})
        with DeferredInterrupt() as interrupt:
            for output in stream_tokens(self.engine, prompt, sampling):
                yield output.text
                interrupt.check()


class DeferredInterrupt:
    """Ctrl-C inside the block is kept until ``check()``: an engine interrupted within a step is broken."""

    def __init__(self):
        self.pending = False
        self.previous: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGINT, self._remember)
        return self

    def __exit__(self, *exc: object) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.pending = True

    def check(self) -> None:
        """Raise KeyboardInterrupt if one came."""
        if self.pending:
            raise KeyboardInterrupt


def stream_tokens(
    engine: Engine, prompt_token_ids: list[int], sampling: SamplingParams
) -> Iterator[TokenOutput]:
    """The tokens of one request as they come; leaving early aborts it.

    Raises FourfoldError when the prompt fills the model's context.
    """
    if len(prompt_token_ids) >= engine.max_request_tokens:
        raise FourfoldError(
            f"The prompt has {len(prompt_token_ids)} tokens and the model's context only "
            f"{engine.max_request_tokens}: shorten it (in a chat, /reset starts anew)."
        )
    request_id, finished = uuid.uuid4().hex, False
    engine.add(Request(request_id, prompt_token_ids, sampling))
    try:
        while not finished:
            for output in engine.step():
                if output.request_id == request_id:
                    finished = output.finish_reason is not None
                    yield output
    finally:
        if not finished:
            engine.abort(request_id)


class GenerationRecord(Record):
    """The result of ``fourfold generate``. Times are wall time of this machine; loading is not in them."""

    kind: Literal["fourfold.generation/1"] = "fourfold.generation/1"
    model: ModelCard
    computed: str = Field(description="which way: the arithmetic, what by, and the dtype of the rest")
    prompt: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str
    ttft_ms: float = Field(description="from the request to its first token")
    tpot_ms: float | None = Field(description="mean time from a token to the next; None for a single token")
    total_ms: float


def timed_generation(
    engine: Engine, prompt: str, sampling: SamplingParams, show: Callable[[str], object]
) -> GenerationRecord:
    """Continue ``prompt``, handing each piece of text to ``show``. Raises FourfoldError."""
    prompt_token_ids = engine.tokenizer.encode(prompt, add_special_tokens=True)
    outputs: list[TokenOutput] = []
    start_s = time.perf_counter()
    times_s = []
    for output in stream_tokens(engine, prompt_token_ids, sampling):
        times_s.append(time.perf_counter() - start_s)
        outputs.append(output)
        show(output.text)
    gaps = len(times_s) - 1
    return GenerationRecord(
        model=engine.card,
        computed=engine.computed,
        prompt=prompt,
        prompt_token_ids=prompt_token_ids,
        token_ids=[o.token_id for o in outputs],
        text="".join(o.text for o in outputs),
        finish_reason=outputs[-1].finish_reason or "abort",
        ttft_ms=times_s[0] * 1e3,
        tpot_ms=(times_s[-1] - times_s[0]) / gaps * 1e3 if gaps else None,
        total_ms=times_s[-1] * 1e3,
    )

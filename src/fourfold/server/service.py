"""From a request body to running engine requests: names, tokens, limits, sampling parameters."""

import asyncio
import uuid
from collections.abc import Sequence
from functools import partial

from pydantic import ValidationError

from fourfold.core.errors import FourfoldError
from fourfold.engine import Engine, Request, SamplingParams, echo
from fourfold.server.errors import ApiError, from_validation
from fourfold.server.generation import Generation
from fourfold.server.loop import EngineLoop
from fourfold.server.metrics import LatencyWatch, ServerMetrics
from fourfold.server.schemas import ChatRequest, CompletionRequest, GenerationRequest
from fourfold.server.shapes import ChatShape, CompletionShape, Shape

MAX_CHOICES_IN_ALL = 4096
SAME_NAMES = (
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
)
Prompts = list[str] | list[list[int]]
COMPLETION_MAX_TOKENS = 16  # OpenAI's default for completions; a chat may go on until the context is full


class Service:
    """One served model: begins generations on the engine's loop."""

    def __init__(self, engine: Engine, loop: EngineLoop):
        self.engine, self.loop = engine, loop
        self.name = engine.card.name
        self.metrics = ServerMetrics(lambda: engine.stats)

    async def begin_completion(self, body: CompletionRequest) -> Generation:
        """Start a completion. Raises ApiError."""
        self.check(body)
        watch = LatencyWatch(self.metrics)
        prompts = await self.encode_prompts(body.prompt, body.add_special_tokens)
        sampling = sampling_of(body, body.max_tokens or COMPLETION_MAX_TOKENS, body.logprobs)
        for prompt in prompts if body.echo else []:
            self.check_prompt(prompt, sampling.max_tokens)
        echoes = [
            await self.loop.call(partial(echo, self.engine, prompt, body.logprobs))
            for prompt in (prompts if body.echo else [])
        ]
        shape = CompletionShape(self.engine.tokenizer.token_text)
        generation = self.begin(prompts, body.n, sampling, shape, watch)
        generation.echoes = echoes
        return generation

    async def begin_chat(self, body: ChatRequest) -> Generation:
        """Start the next turn of a chat. Raises ApiError."""
        self.check(body)
        watch = LatencyWatch(self.metrics)
        prompt = await asyncio.to_thread(self.encode_chat, body)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        sampling = sampling_of(body, body.max_completion_tokens or body.max_tokens, logprobs)
        return self.begin([prompt], body.n, sampling, ChatShape(self.engine.tokenizer.token_text), watch)

    def check(self, body: GenerationRequest) -> None:
        """Refuse what needs no tokens to be refused."""
        if (refusal := self.loop.refusal()) is not None:
            raise refusal
        self.check_name(body.model)

    def check_name(self, name: str | None) -> None:
        """A request may leave the model out; naming another one is a 404."""
        if name is not None and name != self.name:
            message = f"The model '{name}' does not exist. This server serves '{self.name}'."
            raise ApiError(404, message, param="model", code="model_not_found")

    async def encode_prompts(self, prompts: Prompts, add_special_tokens: bool) -> list[list[int]]:
        """Token ids of prompts, which are all of one kind; texts may be long, so a thread encodes them."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if not texts:
            return [prompt for prompt in prompts if isinstance(prompt, list)]
        encode = partial(self.engine.tokenizer.encode, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(lambda: list(map(encode, texts)))

    def encode_chat(self, body: ChatRequest) -> list[int]:
        """Token ids of the conversation."""
        messages = [message.as_template_input() for message in body.messages]
        variables = body.chat_template_kwargs.model_dump(exclude_none=True)
        try:
            return self.engine.tokenizer.apply_chat_template(messages, **variables)
        except FourfoldError as error:
            raise ApiError(400, str(error), param="messages") from error

    def begin(
        self,
        prompts: Sequence[list[int]],
        n: int,
        sampling: SamplingParams,
        shape: Shape,
        watch: LatencyWatch,
    ) -> Generation:
        """Queue ``n`` choices of every prompt, numbered prompt by prompt as OpenAI does."""
        if len(prompts) * n > MAX_CHOICES_IN_ALL:
            raise ApiError(400, f"prompts times n must be at most {MAX_CHOICES_IN_ALL}.", param="n")
        for prompt in prompts:
            self.check_prompt(prompt, sampling.max_tokens)
        generation_id = shape.id_prefix + uuid.uuid4().hex
        pairs = [(prompt, i) for prompt in prompts for i in range(n)]
        requests = [
            Request(f"{generation_id}-{j}", prompt, reseeded(sampling, i))
            for j, (prompt, i) in enumerate(pairs)
        ]
        prompt_tokens = sum(map(len, prompts))
        stream = self.loop.submit(requests)
        self.metrics.prompt_tokens.inc(prompt_tokens)
        return Generation(generation_id, self.name, shape, prompt_tokens, n, stream, watch)

    def check_prompt(self, prompt: list[int], max_tokens: int | None) -> None:
        """Refuse prompts that are empty, or do not fit the model's context together with their output."""
        if not prompt:
            raise ApiError(400, "The prompt holds no tokens.", param="prompt", code="invalid_value")
        limit, wanted = self.engine.max_request_tokens, len(prompt) + (max_tokens or 1)
        if wanted > limit:
            message = (
                f"This model's maximum context length is {limit} tokens, but the request needs {wanted}: "
                f"{len(prompt)} in the prompt and {max_tokens or 'at least 1'} to generate. "
                "Shorten the prompt or ask for fewer tokens."
            )
            raise ApiError(400, message, param="prompt", code="context_length_exceeded")


def sampling_of(body: GenerationRequest, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
    """The engine's sampling parameters for a request. Raises ApiError when the engine refuses a value."""
    if max_tokens is not None and body.min_tokens > max_tokens:
        message = f"min_tokens ({body.min_tokens}) must not be more than max_tokens ({max_tokens})."
        raise ApiError(400, message, param="min_tokens", code="invalid_value")
    try:
        shared = {name: getattr(body, name) for name in SAME_NAMES}
        return SamplingParams(**shared, max_tokens=max_tokens, logprobs=logprobs)
    except ValidationError as error:
        raise from_validation(error.errors()) from error


def reseeded(sampling: SamplingParams, choice: int) -> SamplingParams:
    """Each of ``n`` choices draws from its own seed, or they would all be the same text."""
    if sampling.seed is None or choice == 0:
        return sampling
    return sampling.model_copy(update={"seed": (sampling.seed + choice + 2**63) % 2**64 - 2**63})

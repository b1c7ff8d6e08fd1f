"""What clients may send: OpenAI's completion and chat requests, with vLLM's sampling extras.

``null`` means "not given", as OpenAI has it. Parameters that change nothing here (``user``, ``metadata``...)
are accepted; those that would change the answer and are not supported are refused by name, and so is any
key nobody knows: a typo must not silently become a default.
Source: OpenAI API reference (completions, chat completions); vLLM's OpenAI-compatible server for the extras.
"""

import json
from functools import cache
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from fourfold.server.errors import unsupported

MAX_CHOICES = 128
MAX_PROMPTS = 2048
MAX_TOP_LOGPROBS = 20
MIN_TEMPERATURE = 0.01
MAX_STOPS = 64

IGNORED = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
}

# parameter -> the values that ask for nothing special, which is all this server does
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "best_of": (1,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
}

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=1000)]


def encodable(text: str) -> str:
    """JSON can hold half a surrogate pair, which is no text: tokenizers cannot take it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("the text holds an unpaired surrogate and is not valid Unicode") from error
    return text


Text = Annotated[str, AfterValidator(encodable)]


class ApiModel(BaseModel):
    """Unknown keys are errors, nulls are absences, numbers are finite."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, data: Any) -> Any:
        """A key whose value is null was not given."""
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class StreamOptions(ApiModel):
    """What a stream tells besides its tokens."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] = False


@cache
def neutral_of(model: type[BaseModel]) -> dict[str, tuple[Any, ...]]:
    """Those of ``NEUTRAL`` that ``model`` has no field for."""
    return {name: values for name, values in NEUTRAL.items() if name not in model.model_fields}


class GenerationRequest(ApiModel):
    """What completions and chat have in common."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=1)
    stop: list[StopString] = Field([], max_length=MAX_STOPS)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    # vLLM's extras
    top_k: int = Field(0, ge=-1, lt=2**31, description="0 and -1: all tokens")
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    min_tokens: int = Field(0, ge=0, lt=2**31)
    stop_token_ids: list[TokenId] = Field([], max_length=MAX_STOPS)
    ignore_eos: bool = False

    @model_validator(mode="before")
    @classmethod
    def refuse_unsupported(cls, data: Any) -> Any:
        """Drop what changes nothing; refuse what this server cannot do, by name."""
        if not isinstance(data, dict):
            return data
        kept = {}
        neutral = neutral_of(cls)
        for name, value in data.items():
            if name in neutral and value is not None and value not in neutral[name]:
                allowed = " or ".join(map(json.dumps, neutral[name]))
                remedy = f"leave it out or send {allowed}" if allowed else "leave it out"
                raise unsupported(name, f"This server does not support '{name}': {remedy}.")
            if name not in neutral and name not in IGNORED:
                kept[name] = value
        return kept

    @field_validator("temperature")
    @classmethod
    def no_overflow(cls, value: float) -> float:
        """Logits divided by a tiny temperature overflow; from here on down the choice is greedy anyway."""
        return value and max(value, MIN_TEMPERATURE)

    @field_validator("stop", mode="before")
    @classmethod
    def one_stop_is_a_list(cls, value: Any) -> Any:
        """``stop`` may be one string."""
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def options_need_a_stream(self) -> Self:
        """``stream_options`` says how to stream, so there must be a stream."""
        if self.stream_options is not None and not self.stream:
            raise unsupported("stream_options", "'stream_options' is only allowed together with 'stream'.")
        return self


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``: continue text, or token ids exactly as given."""

    prompt: list[Text] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool = Field(False, description="begin the answer with the prompt, and its logprobs if asked for")
    add_special_tokens: bool = Field(True, description="let the tokenizer put its BOS before a text prompt")

    @model_validator(mode="after")
    def echo_comes_whole(self) -> Self:
        """A prompt is no stream of new tokens."""
        if self.echo and self.stream:
            raise unsupported("echo", "'echo' is only supported without 'stream'.")
        return self

    @field_validator("prompt", mode="before")
    @classmethod
    def as_list_of_prompts(cls, value: Any) -> Any:
        """One text or one list of token ids becomes a list of one."""
        # the two are told apart here and not by pydantic's union, for the sake of a clear message
        prompts = [value] if isinstance(value, str) or is_token_ids(value) else value
        if not isinstance(prompts, list) or not 1 <= len(prompts) <= MAX_PROMPTS:
            raise ValueError(f"give a text, token ids, or a list of 1 to {MAX_PROMPTS} of either")
        texts = all(isinstance(p, str) for p in prompts)
        if not texts and not all(is_token_ids(p) for p in prompts):
            raise ValueError("a prompt is a text or a non-empty list of token ids >= 0, all of one kind")
        return prompts


def is_token_ids(value: Any) -> bool:
    """Whether ``value`` is a non-empty list of token ids."""
    return isinstance(value, list) and bool(value) and all(type(v) is int and 0 <= v < 2**31 for v in value)


class TextPart(ApiModel):
    """One part of a message's content."""

    type: Literal["text"]
    text: Text


class Message(ApiModel):
    """One turn of a conversation; keys that clients echo from an answer may be there if empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: list[TextPart] = []
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def drop_empty_echoes(cls, data: Any) -> Any:
        """``tool_calls: []``, ``annotations: []`` and the like come back from clients that echo answers."""
        return {k: v for k, v in data.items() if v != []} if isinstance(data, dict) else data

    @field_validator("content", mode="before")
    @classmethod
    def text_is_one_part(cls, value: Any) -> Any:
        """``content`` may be a text."""
        return [{"type": "text", "text": value}] if isinstance(value, str) else value

    def as_template_input(self) -> dict[str, str]:
        """The message as chat templates take it; text parts are joined by newlines, as vLLM does."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "\n".join(part.text for part in self.content)}


class TemplateVariables(ApiModel):
    """What a client may tell the model's chat template besides the messages."""

    enable_thinking: bool | None = None


class ChatRequest(GenerationRequest):
    """``POST /v1/chat/completions``: the next turn of a conversation."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    chat_template_kwargs: TemplateVariables = TemplateVariables()

    @model_validator(mode="after")
    def top_needs_logprobs(self) -> Self:
        """As OpenAI has it: ``top_logprobs`` only with ``logprobs``."""
        if self.top_logprobs is not None and not self.logprobs:
            raise unsupported("top_logprobs", "'top_logprobs' needs 'logprobs' to be true.")
        return self

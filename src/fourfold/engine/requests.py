"""What goes into the engine and what comes out: settings, sampling parameters, requests, tokens, completions.

The sampling parameters mean what they mean in the OpenAI API and, beyond it, in vLLM; the records refuse
unknown keys and values out of range, so that the server can hand a body's fields over as they are.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from fourfold.core.quantization import KVCacheFormat
from fourfold.core.records import Record

FinishReason = Literal["stop", "length"]
DtypeName = Literal["auto", "bfloat16", "float32"]
KVCacheChoice = Literal["auto", "none", KVCacheFormat]
ArithmeticName = Literal["auto", "int8", "exact"]


class EngineConfig(Record):
    """How the engine runs; the defaults suit a small machine."""

    max_batch_size: int = Field(default=32, ge=1, description="sequences that may decode at the same time")
    max_batch_tokens: int = Field(
        default=512,
        ge=1,
        description="tokens of one step; longer prompts are read in chunks, a quarter of it beside decodes",
    )
    kv_block_size: int = Field(
        default=16, ge=1, description="tokens per KV block, the unit of paging and reuse"
    )
    kv_cache_tokens: int | None = Field(
        default=None,
        ge=1,
        description="tokens the KV cache holds; None: max_batch_size full contexts within 1 GiB",
    )
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads; None: one per core of this process"
    )
    dtype: DtypeName = Field(
        default="auto",
        description="of kept matrices, activations and unquantized KV; norms, biases, routers are float32; "
        "auto: bfloat16, with exact arithmetic float32 for a checkpoint in float16 or float32 (16 bits of "
        "inputs for float16, which has 11)",
    )
    kv_cache: KVCacheChoice = Field(
        default="auto",
        description="how keys and values are held; auto: as the checkpoint says, none: in dtype",
    )
    arithmetic: ArithmeticName = Field(
        default="auto",
        description="of linear layers; int8: inputs rounded to int8 in blocks of 32, exact: only to dtype; "
        "auto: int8 where the checkpoint's own rounding of inputs is none or of 8 bits, or int8 holds its "
        "values (mxfp4, mxfp6-e2m3), else exact",
    )
    packed_cache: bool = Field(
        default=True, description="keep packed weights on disk beside the checkpoint, for the next start"
    )
    prefix_cache: bool = Field(default=True, description="reuse the KV blocks of an equal prompt beginning")
    speculative_tokens: int = Field(
        default=0,
        ge=0,
        description="longest draft looked up in the text so far and tried in one step; 0: none",
    )
    speculative_min_ngram: int = Field(default=2, ge=1, description="fewest last tokens that are looked up")
    speculative_max_ngram: int = Field(default=3, ge=1, description="most last tokens that are looked up")

    @model_validator(mode="after")
    def _ngrams_have_sizes(self) -> "EngineConfig":
        if self.speculative_max_ngram < self.speculative_min_ngram:
            raise ValueError(
                f"speculative_max_ngram ({self.speculative_max_ngram}) must be at least "
                f"speculative_min_ngram ({self.speculative_min_ngram})"
            )
        return self

    @model_validator(mode="after")
    def _every_decode_fits_a_step(self) -> "EngineConfig":
        if self.max_batch_tokens < self.max_batch_size:
            raise ValueError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least max_batch_size "
                f"({self.max_batch_size}): every decoding sequence needs one token of each step"
            )
        return self


class SamplingParams(Record):
    """How the next token is chosen and when to stop. The default samples from the plain distribution."""

    max_tokens: int | None = Field(default=16, ge=1, description="None: until the context is full")
    min_tokens: int = Field(default=0, ge=0, description="no stop of any kind before this many tokens")
    temperature: float = Field(default=1.0, ge=0.0, description="0 (below 1e-5) is greedy")
    top_k: int = Field(default=0, ge=-1, description="keep the k likeliest tokens; 0 or -1: all")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, description="keep the likeliest tokens that sum to p")
    min_p: float = Field(
        default=0.0, ge=0.0, le=1.0, description="drop tokens below min_p times the likeliest"
    )
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    repetition_penalty: float = Field(
        default=1.0, gt=0.0, description="of prompt and output tokens; above 1 damps"
    )
    seed: int | None = Field(
        default=None,
        ge=-(2**63),
        lt=2**64,
        description="equal seeds give equal tokens, whatever runs beside them",
    )
    stop: list[str] = Field(default=[], description="end before any of these texts, which are not emitted")
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = []
    ignore_eos: bool = False
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=100,
        description="how many of the likeliest tokens to report besides the chosen one",
    )

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, stop: list[str]) -> list[str]:
        if "" in stop:
            raise ValueError("a stop string must not be empty")
        return stop


@dataclass(slots=True)
class Request:
    """One prompt to continue. ``request_id`` is the caller's and must be unique among unfinished requests."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)


@dataclass(slots=True)
class TokenOutput:
    """One generated token.

    ``text`` is what became printable with this token: "" while a character is incomplete or while the
    text may turn out to be a stop string. ``logprob`` and ``top_logprobs`` (likeliest first, natural
    logarithm) are of the model's own distribution, before penalties and temperature; they are set when
    logprobs were asked for. ``finish_reason`` is set on the request's last token only. ``cached_tokens`` of
    the prompt were found in the prefix cache when the request was admitted first.
    """

    request_id: str
    token_id: int
    text: str
    logprob: float | None = None
    top_logprobs: list[tuple[int, float]] | None = None
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0


@dataclass(slots=True)
class Completion:
    """All of one request's output, as ``Engine.generate`` returns it."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None

    def extend(self, output: TokenOutput) -> None:
        """Take in the request's next token."""
        self.token_ids.append(output.token_id)
        self.text += output.text
        if output.logprob is not None and output.top_logprobs is not None:
            self.logprobs = [*(self.logprobs or []), output.logprob]
            self.top_logprobs = [*(self.top_logprobs or []), output.top_logprobs]
        if output.finish_reason is not None:
            self.finish_reason = output.finish_reason


@dataclass(slots=True)
class EngineStats:
    """Gauges of this moment and counters since loading."""

    running: int = 0
    waiting: int = 0
    kv_tokens_used: int = 0
    kv_tokens_total: int = 0
    prefix_hit_tokens: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    finished: int = 0
    aborted: int = 0
    steps: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache that unfinished requests hold, 0..1."""
        return self.kv_tokens_used / self.kv_tokens_total if self.kv_tokens_total else 0.0

"""What the rooms hand each other: JSON records with units in their names.

Every record refuses unknown keys, so that a typo or a newer file is an error and never a silent default.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Record(BaseModel):
    """A frozen JSON record; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Estimate(Record):
    """A measured value with its 95 % confidence interval; ``low == high == value`` when it is exact."""

    value: float
    low: float
    high: float


class Machine(Record):
    """Where a figure was obtained."""

    cpu: str
    cores: int
    memory_bytes: int
    gpu: str | None = None
    os: str
    python: str
    versions: dict[str, str] = {}


class ModelCard(Record):
    """What a model is, as far as its checkpoint tells: enough for a table row without opening the weights."""

    name: str
    architecture: str
    parameters: int
    weight_format: str = Field(
        description="the format of most quantized weights, or bf16/fp16/fp32 when none is"
    )
    activation_format: str | None = None
    kv_cache_format: str | None = None
    size_bytes: int = Field(description="all tensors of the checkpoint, scales included")
    bits_per_weight: float = Field(description="size_bytes * 8 / parameters")
    notes: list[str] = []


class TextQuality(Record):
    """Quality on one text, or over all of them. Estimates are per token, natural logarithm."""

    tokens: int = Field(description="tokens that were predicted and scored")
    windows: int | None = Field(default=None, description="independent pieces of text behind the intervals")
    perplexity: Estimate
    perplexity_base: Estimate | None = None
    perplexity_ratio: Estimate | None = Field(
        default=None,
        description="perplexity / perplexity_base; both see the same windows, so the interval is paired",
    )
    kl_divergence: Estimate | None = Field(default=None, description="mean KL(base || model), nats per token")
    top1_agreement: Estimate | None = Field(
        default=None, description="share of tokens with the same argmax, 0..1"
    )
    tail_tokens: int | None = Field(
        default=None, description="how many of the scored tokens are the rarest tenth"
    )
    tail_loss: Estimate | None = Field(default=None, description="mean loss on the rarest tenth, nats")
    tail_loss_base: Estimate | None = None
    tail_loss_increase: Estimate | None = Field(
        default=None, description="tail_loss - tail_loss_base, paired as perplexity_ratio is"
    )


class PositionLoss(Record):
    """Loss where ``start`` to ``end - 1`` tokens stand before the predicted one; nats per token."""

    start: int
    end: int
    tokens: int
    loss: Estimate
    loss_base: Estimate | None = None
    loss_increase: Estimate | None = Field(default=None, description="loss - loss_base, paired")


class LinearError(Record):
    """What rounding did to one quantized weight: its distance from the base's, over the base's size."""

    name: str
    layer: int | None = Field(description="the decoder layer it is in, if any")
    format: str
    relative_error: float = Field(description="|W_q - W| / |W|, Frobenius")
    sqnr_db: float | None = Field(description="-20 log10(relative_error); None when there is no error")


class LayerError(Record):
    """What one decoder layer contributes, and what has built up behind it; over all scored tokens."""

    layer: int
    own_error: float = Field(
        description="mean over tokens of |h' - h| / |h| after this layer, if it alone is the model's"
    )
    built_up_error: float = Field(description="the same, all layers the model's")
    kl_divergence: Estimate = Field(
        description="mean KL(base || base with only this layer the model's), nats per token"
    )


class LayerPicture(Record):
    """Where the damage is: per decoder layer and per quantized linear."""

    window_tokens: int
    windows: int
    layers: list[LayerError]
    linears: list[LinearError]
    notes: list[str] = []


class FrontierPoint(Record):
    """One mixture of formats. ``groups`` counts those in each format."""

    bits: float = Field(description="mean bits of a weight in the groups, scales included")
    size_bytes: int = Field(description="all tensors of the checkpoint, as ModelCard.size_bytes")
    predicted_kl: float = Field(description="KL(original || quantized), nats per token, second order")
    groups: dict[str, int]


class FormatGroup(Record):
    """Modules that share a format, the one chosen for them, and what each candidate is told to cost."""

    modules: list[str]
    weights: int
    format: str
    predicted_kl: dict[str, float]


class Frontier(Record):
    """The best mixtures of formats from the smallest checkpoint to the largest, and the one for a budget."""

    kind: Literal["fourfold.frontier/1"] = "fourfold.frontier/1"
    source: str
    recipe: str
    dialect: str
    budget: str
    points: list[FrontierPoint]
    chosen: int = Field(description="which of the points the budget gave")
    groups: list[FormatGroup]
    samples: int = Field(description="sequences behind the predicted KL")
    sequence_tokens: int
    notes: list[str] = []


class GateResult(Record):
    """One threshold of ``--gate`` and whether the measured value kept it."""

    metric: str
    limit: float
    value: float
    passed: bool


class EvaluationRecord(Record):
    """The result of ``fourfold evaluate``: a model, a base, quality overall and per text."""

    kind: Literal["fourfold.evaluation/1"] = "fourfold.evaluation/1"
    created: str
    model: ModelCard
    base: ModelCard | None = None
    overall: TextQuality
    texts: dict[str, TextQuality]
    gates: list[GateResult] = []
    task: str = "heldout"
    method: str = Field(default="", description="how windows were cut and intervals were made, in words")
    window_tokens: int
    max_tokens_per_text: int | None = Field(default=None, description="None: texts were read whole")
    positions: list[PositionLoss] = Field(default=[], description="by context, of the task longcontext")
    layers: LayerPicture | None = None
    computed: str = Field(default="", description="which way the model was: the arithmetic, and what by")
    machine: Machine


class Score(Record):
    """One figure of a task that asks a served model questions."""

    name: str = Field(description="what a gate names: pass@1, or task/metric")
    value: Estimate
    higher_is_better: bool = True
    questions: int


class Attempt(Record):
    """One answer to one question, and how it was judged."""

    question: str
    sample: int
    passed: bool
    reason: str
    answer: str


class ScoresRecord(Record):
    """The result of ``fourfold evaluate`` for a task over HTTP: humaneval, lm-eval."""

    kind: Literal["fourfold.scores/1"] = "fourfold.scores/1"
    created: str
    target: str = Field(description="base URL, or the model folder that was served for the task")
    model_name: str = Field(description="the name the server answers to")
    model: ModelCard | None = Field(
        default=None, description="None when the server does not say what it serves"
    )
    task: str
    scores: list[Score]
    gates: list[GateResult] = []
    attempts: list[Attempt] = []
    settings: dict[str, str | int | float | None] = {}
    method: str = ""
    notes: list[str] = []
    machine: Machine


class RequestRecord(Record):
    """One request as the client saw it; every latency is computed from these times, and from nothing else.

    Times are seconds on one monotonic clock whose zero is the start of the run.
    """

    request_id: str
    prompt_tokens: int
    output_tokens: int
    start_s: float
    token_times_s: list[float] = Field(description="arrival of each output token, in order")
    end_s: float
    error: str | None = None


class RunSettings(Record):
    """What one measured run asked for."""

    profile: str
    concurrency: int
    input_tokens: int
    output_tokens: int
    requests: int
    warmup_requests: int
    scale: float
    seed: int


class RunRecord(Record):
    """One closed-loop run of one profile at one concurrency: settings, every request, the metrics."""

    kind: Literal["fourfold.run/1"] = "fourfold.run/1"
    created: str
    target: str = Field(description="base URL, or the model folder that was served for the run")
    model_name: str = Field(description="the name the server answers to")
    model: ModelCard | None = Field(
        default=None, description="None when the server does not say what it serves"
    )
    settings: RunSettings
    machine: Machine = Field(description="the machine of the client; of the server too when both share it")
    duration_s: float
    error_rate: float
    excluded: bool = Field(
        description="true when the error rate is above 10 %; such a run has no say in results"
    )
    metrics: dict[str, float] = Field(description="name with unit -> value; definitions in bench/metrics")
    requests: list[RequestRecord]
    notes: list[str] = Field([], description="what a reader must know of how this run was measured")

"""Records to report on: requests with times made here, every figure computed from them by bench itself."""

from pathlib import Path

from fourfold.bench.endpoint import Endpoint
from fourfold.bench.record import make_record
from fourfold.core.records import (
    Estimate,
    EvaluationRecord,
    GateResult,
    LayerError,
    LayerPicture,
    LinearError,
    Machine,
    ModelCard,
    PositionLoss,
    RequestRecord,
    RunRecord,
    RunSettings,
    Score,
    ScoresRecord,
    TextQuality,
)

MACHINE = Machine(
    cpu="Test CPU", cores=2, memory_bytes=2**34, os="Linux", python="3.11.0", versions={"fourfold": "0"}
)
NOTE = "The weights were once rounded to Q4_1 (210 tensors) in a GGUF file."


def card(name: str = "model", weight_format: str = "bf16", size_bytes: int = 2_000_000, **more) -> ModelCard:
    values = {
        "name": name,
        "architecture": "LlamaForCausalLM",
        "parameters": 1_000_000,
        "weight_format": weight_format,
        "size_bytes": size_bytes,
        "bits_per_weight": size_bytes * 8 / 1_000_000,
        "notes": [NOTE],
    }
    return ModelCard(**(values | more))


BASE = card()
QUANTIZED = card("model-mxfp4", "mxfp4", 600_000)


def requests(ttft_s: float, step_s: float, count: int = 4, failing: int = 0) -> list[RequestRecord]:
    made = []
    for i in range(count):
        times = [i + ttft_s * (1 + i / 10) + step_s * k for k in range(8)]
        made.append(
            RequestRecord(
                request_id=f"request-{i}",
                prompt_tokens=16,
                output_tokens=8,
                start_s=float(i),
                token_times_s=times,
                end_s=times[-1],
                error="HTTP 503: too <busy>" if i < failing else None,
            )
        )
    return made


def run_record(
    model: ModelCard | None,
    made: list[RequestRecord],
    profile="chat",
    concurrency=1,
    name="served",
    **changes,
) -> RunRecord:
    settings = RunSettings(
        profile=profile,
        concurrency=concurrency,
        input_tokens=16,
        output_tokens=8,
        requests=len(made),
        warmup_requests=1,
        scale=0.125,
        seed=0,
    )
    endpoint = Endpoint("http://127.0.0.1:1", name, model)
    record = make_record("2026-01-02T03:04:05+00:00", "http://h:1", endpoint, settings, made, ["a note"])
    return record.model_copy(update={"machine": MACHINE} | changes)


def near(value: float, spread: float = 0.1) -> Estimate:
    return Estimate(value=value, low=value * (1 - spread), high=value * (1 + spread))


def evaluation(model: ModelCard = QUANTIZED, base: ModelCard | None = BASE, **changes) -> EvaluationRecord:
    def quality(factor: float) -> TextQuality:
        compared = {
            "perplexity_base": near(11.5 * factor),
            "perplexity_ratio": near(1.0734, 0.01),
            "kl_divergence": near(0.04321 * factor),
            "top1_agreement": near(0.8765, 0.02),
        }
        return TextQuality(
            tokens=1234, windows=4, perplexity=near(12.3456 * factor), **(compared if base else {})
        )

    values = {
        "created": "2026-01-03T00:00:00+00:00",
        "model": model,
        "base": base,
        "overall": quality(1.0),
        "texts": {"prose": quality(1.1), "code": quality(0.9)},
        "gates": [
            GateResult(metric="kl_divergence", limit=0.05, value=0.04321, passed=True),
            GateResult(metric="top1_agreement", limit=0.9, value=0.8765, passed=False),
        ],
        "method": "windows that do not overlap",
        "window_tokens": 512,
        "max_tokens_per_text": 4096,
        "machine": MACHINE,
    }
    return EvaluationRecord(**(values | changes))


def long_context(model: ModelCard = QUANTIZED, base: ModelCard | None = BASE) -> EvaluationRecord:
    positions = [
        PositionLoss(
            start=start,
            end=end,
            tokens=end - start,
            loss=near(3.21 + i),
            loss_base=near(3.11 + i),
            loss_increase=near(0.0987 + i),
        )
        for i, (start, end) in enumerate([(1, 32), (32, 64)])
    ]
    values = {"task": "longcontext", "positions": positions, "window_tokens": 64, "texts": {}, "gates": []}
    return evaluation(model, base).model_copy(update=values)


def picture() -> LayerPicture:
    return LayerPicture(
        window_tokens=128,
        windows=12,
        layers=[
            LayerError(
                layer=i, own_error=0.0123 + i, built_up_error=0.0234 + i, kl_divergence=near(0.0345 + i)
            )
            for i in range(2)
        ],
        linears=[
            LinearError(
                name=f"model.layers.{i}.mlp.{kind}",
                layer=i,
                format="mxfp4",
                relative_error=0.11,
                sqnr_db=19.17 + i,
            )
            for i in range(2)
            for kind in ("up_proj", "down_proj")
        ],
        notes=["1 norms differ <b>"],
    )


def scores(model: ModelCard | None = QUANTIZED, name: str = "pass@1") -> ScoresRecord:
    return ScoresRecord(
        created="2026-01-04T00:00:00+00:00",
        target="http://h:1",
        model_name="served",
        model=model,
        task="humaneval",
        scores=[Score(name=name, value=near(0.1357), questions=164)],
        settings={"samples": 1, "max_tokens": 99, "temperature": 0.0},
        method="asked and judged",
        notes=["Sandbox: own process."],
        machine=MACHINE,
    )


def write(path: Path, record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(record.model_dump_json())

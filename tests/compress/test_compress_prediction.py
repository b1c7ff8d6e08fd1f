"""The dry run of a calibrated recipe runs one layer, tells the cost of all, and leaves nothing behind."""

import time

import pytest
import torch
from compress_models import tensor_bytes
from tiny_models import build_tiny_model

from fourfold.compress import Recipe, plan, quantize
from fourfold.compress.calibrated import prediction
from fourfold.compress.calibrated.prediction import ENOUGH_S, ENOUGH_UNITS, Rehearsal, representative
from fourfold.compress.calibration import CalibrationSet, SelfWritten
from fourfold.compress.passes import distill

GPTQ = Recipe.model_validate({"name": "own", "rules": [{"weight": "mxfp4"}], "passes": ["gptq"]})
TOKENS = CalibrationSet(torch.arange(4 * 32).view(4, 32), "counted", 0)


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """Which layers passes really worked on, one after the other."""
    from fourfold.compress.calibrated.loop import LayerLoop

    found, run_passes = [], LayerLoop.run_passes
    monkeypatch.setattr(
        LayerLoop, "run_passes", lambda self, work: found.append(work.index) or run_passes(self, work)
    )
    return found


def test_one_layer_is_run_and_nothing_is_left(tiny_llama, tmp_path, made):
    dry = plan(tiny_llama, GPTQ, calibration=TOKENS, beside=tmp_path)
    assert len(set(made)) == 1
    assert not list(tmp_path.iterdir())
    assert dry.calibration_samples == 4 and dry.calibration_sequence_tokens == 32
    assert dry.layer_s is not None and 0 < 2 * dry.layer_s < dry.time_estimate_s
    assert dry.device == "cpu" and dry.gpu_memory_bytes is None
    quantize(tiny_llama, tmp_path / "out", GPTQ, calibration=TOKENS)
    assert dry.output_bytes == tensor_bytes(tmp_path / "out")


@pytest.mark.parametrize(("first_s", "again"), [(ENOUGH_S - 1, True), (ENOUGH_S, False)])
def test_a_short_layer_is_run_again_because_the_first_time_holds_what_is_set_up_once(
    tiny_llama, tmp_path, made, monkeypatch, first_s, again
):
    from fourfold.compress.calibrated.loop import LayerLoop

    now_s, step = [0.0], LayerLoop.step

    def slow(self, index):
        now_s[0] += 2.0 if made else first_s
        return step(self, index)

    monkeypatch.setattr(LayerLoop, "step", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: now_s[0])
    monkeypatch.setattr(prediction, "representative", lambda loop: (0, 5.5))
    dry = plan(tiny_llama, GPTQ, calibration=TOKENS, beside=tmp_path)
    assert made == ([0, 0] if again else [0])
    further_s = 2.0 if again else first_s
    assert dry.layer_s == further_s
    assert dry.time_estimate_s == pytest.approx(first_s + 4.5 * further_s)


def test_the_disk_of_the_layers_is_foreseen(tiny_llama, tmp_path):
    seen = []

    def look(done, total, name):
        if done == total:
            seen.append(
                sum(p.stat().st_size for p in (tmp_path / "out.partial" / "layers").glob("*.safetensors"))
            )

    dry = plan(tiny_llama, GPTQ, calibration=TOKENS, beside=tmp_path)
    quantize(tiny_llama, tmp_path / "out", GPTQ, calibration=TOKENS, layer_progress=look)
    assert 0.9 < dry.temporary_disk_bytes / seen[0] <= 1  # files have headers


def test_what_the_model_would_write_is_timed_on_a_piece(tiny_llama, tmp_path):
    asked = []

    def write(first, count):
        asked.append((first, count))
        return torch.zeros(count, 16, dtype=torch.int64)

    dry = plan(tiny_llama, GPTQ, calibration=SelfWritten(80, 16, 0, write), beside=tmp_path)
    assert asked == [(0, 32)] and dry.calibration_samples == 80


def test_what_is_learned_over_the_whole_model_is_begun_and_counted(tiny_llama, tmp_path, monkeypatch):
    steps, step = [], distill.Student.step
    monkeypatch.setattr(distill.Student, "step", lambda self, share: steps.append(share) or step(self, share))
    times = []
    for count in (3_000, 30_000):
        distilled = {"distill": {"steps": count, "sequences": 2, "own": 12}}
        recipe = GPTQ.model_copy(update={"passes": [distilled]})
        dry = plan(tiny_llama, recipe, calibration=TOKENS, beside=tmp_path)
        times.append(dry.time_estimate_s)
    assert len(steps) == 2 * ENOUGH_UNITS  # though its layer is run twice
    assert 3 < times[1] / times[0] < 30
    # beside the layers, what was learned lies on disk until the end
    alone = plan(tiny_llama, GPTQ, calibration=TOKENS, beside=tmp_path)
    assert dry.temporary_disk_bytes > 1.5 * alone.temporary_disk_bytes
    assert not list(tmp_path.iterdir())


def test_a_rehearsal_leaves_out_what_libraries_need_to_set_themselves_up(monkeypatch):
    rehearsal, now_s = Rehearsal(torch.device("cpu")), [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now_s[0])
    for done, seconds in enumerate((7.0, 1.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1)):
        assert not rehearsal("training", done, 100)
        now_s[0] += seconds
    assert rehearsal("training", 8, 100)
    assert abs(rehearsal.left_s - 92 * 0.1) < 1e-9
    for done in (0, 32):
        assert not rehearsal("writing", done, 128)
        now_s[0] += 20.0
    assert rehearsal("writing", 64, 128)
    assert abs(rehearsal.left_s - 92 * 0.1 - 64 / 32 * 20.0) < 1e-9


def test_the_layer_that_is_run_is_of_the_most_common_kind(tmp_path):
    """A dense layer before experts counts by its parameters."""
    from fourfold.compress.calibrated.loop import LayerLoop
    from fourfold.compress.calibrated.store import LayerStore
    from fourfold.compress.resolve import open_source, resolve

    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "mlp_only_layers": [0],
    }
    source = build_tiny_model(tmp_path / "moe", "qwen3_moe", num_hidden_layers=3, **experts)
    model = resolve(open_source(source), GPTQ).model
    loop = LayerLoop(model, GPTQ, TOKENS, LayerStore(tmp_path), torch.device("cpu"))
    index, shares = representative(loop)
    dense, sparse = (sum(p.numel() for p in loop.skeleton.layers[i].parameters()) for i in (0, 1))
    assert index in (1, 2) and abs(shares - (2 + dense / sparse)) < 1e-9

"""lm-eval against our own server, on tasks and data made here: its scores are those of the engine."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
import torch

from fourfold.bench.target import serving
from fourfold.core.errors import FourfoldError, UsageError
from fourfold.engine import Engine, EngineConfig
from fourfold.evaluate import ServedOptions, evaluate_served
from fourfold.evaluate.tasks import lm_eval as task

CHOICE = """
task: fourfold_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
WRITE = """
task: fourfold_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
QUESTIONS = ["A tale of", "Two and two", "The light was", "In the year", "He said that", "It is a"]
CHOICES = [" one", " two things", " red", " blue sky"]


@dataclass
class Served:
    """A server of the tiny model in a process of its own, and the same engine here."""

    url: str
    engine: Engine


@pytest.fixture(scope="module")
def live(tiny_llama) -> Iterator[Served]:
    engine = Engine.load(tiny_llama, EngineConfig(threads=1, kv_cache_tokens=64))
    with serving(str(tiny_llama), ["--threads", "1"]) as url:
        yield Served(url, engine)


@pytest.fixture
def own_tasks(tmp_path, monkeypatch):
    """A folder of task files, whose answers to write are filled in by ``rows``."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache" / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = tmp_path / "data.jsonl"
    for name, text in (("choice", CHOICE), ("write", WRITE)):
        (tmp_path / f"{name}.yaml").write_text(text.format(data=data))

    def write(rows: list[dict]) -> None:
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    return tmp_path, write


def likeliest(server: Served, question: str) -> int:
    """The choice that the engine itself finds likeliest after ``question``."""
    totals = []
    for choice in CHOICES:
        context, whole = (server.engine.encode(text) for text in (question, question + choice))
        logp = torch.from_numpy(server.engine.logits(whole)).log_softmax(-1)
        totals.append(sum(float(logp[i - 1, whole[i]]) for i in range(len(context), len(whole))))
    return totals.index(max(totals))


def written(server: Served, question: str) -> str:
    body = {"prompt": question, "max_tokens": 4, "temperature": 0, "stop": ["\n"]}
    return httpx.post(f"{server.url}/v1/completions", json=body).json()["choices"][0]["text"]


@pytest.mark.slow
@pytest.mark.e2e
def test_scores_are_those_of_the_engine(live, tiny_llama, own_tasks):
    pytest.importorskip("lm_eval", reason="the extra fourfold[evaluate] is not installed")
    folder, write = own_tasks
    best = [likeliest(live, question) for question in QUESTIONS]
    gold = [*best[:4], *((b + 1) % len(CHOICES) for b in best[4:])]  # right four times, wrong twice
    answers = [written(live, question) for question in QUESTIONS[:3]] + ["never"] * 3
    write(
        [
            {"question": q, "choices": CHOICES, "gold": g, "answer": a}
            for q, g, a in zip(QUESTIONS, gold, answers, strict=True)
        ]
    )
    record = evaluate_served(
        live.url,
        task="lm-eval:fourfold_choice,fourfold_write",
        options=ServedOptions(include=folder, tokenizer=str(tiny_llama), concurrency=2),
    )
    scores = {score.name: score for score in record.scores}
    assert scores["fourfold_choice/acc"].value.value == pytest.approx(4 / 6)
    assert scores["fourfold_write/exact_match"].value.value == pytest.approx(3 / 6)
    for score in scores.values():
        assert score.questions == 6 and score.higher_is_better
        assert 0 < score.value.low < score.value.value < score.value.high < 1
    assert record.model == live.engine.card and record.settings["tokenizer"] == tiny_llama.name


@pytest.mark.slow
@pytest.mark.e2e
def test_what_the_library_cannot_do_is_one_error(live, own_tasks):
    pytest.importorskip("lm_eval", reason="the extra fourfold[evaluate] is not installed")
    folder, write = own_tasks
    write([{"question": "a", "choices": CHOICES, "gold": 0, "answer": "b"}] * 2)
    with pytest.raises(UsageError, match="knows no task 'arc_hard'"):
        evaluate_served(live.url, task="lm-eval:arc_hard")
    with pytest.raises(FourfoldError, match=r"fourfold_choice.*--tokenizer"):
        evaluate_served(live.url, task="lm-eval:fourfold_choice", options=ServedOptions(include=folder))


def test_results_are_read_with_what_they_lack():
    results = {
        "results": {
            "quiz": {
                "alias": "quiz",
                "acc,none": 1.0,
                "acc_stderr,none": 0.0,
                "f1,strict": 0.5,
                "f1_stderr,strict": 0.1,
            },
            "prose": {
                "word_perplexity,none": 12.0,
                "word_perplexity_stderr,none": "N/A",
                "loss,none": 2.0,
                "loss_stderr,none": 0.1,
            },
        },
        "higher_is_better": {"quiz": {"acc": True}, "prose": {"loss": False}},
        "n-samples": {"quiz": {"original": 9, "effective": 8}, "prose": {"original": 3, "effective": 3}},
    }
    scores, notes = task.read_results(results)
    found = {score.name: score for score in scores}
    assert set(found) == {"quiz/acc", "quiz/f1,strict", "prose/loss"}
    assert found["quiz/acc"].value.high == 1 and 0.5 < found["quiz/acc"].value.low < 0.7  # not certain
    assert found["prose/loss"].value.high == pytest.approx(2.196, abs=1e-3)
    assert not found["prose/loss"].higher_is_better and found["quiz/acc"].questions == 8
    assert notes == ["prose/word_perplexity is 12; lm-eval gives no standard error."]


@pytest.mark.parametrize(
    ("words", "options", "named"),
    [
        ("lm-eval", {}, "Name the tasks"),
        ("lm-eval: ,", {}, "Name the tasks"),
        ("lm-eval:arc_easy", {"samples": 2}, "--samples"),
        ("lm-eval:arc_easy", {"include": "nowhere"}, "--include nowhere"),
    ],
)
def test_what_cannot_be_is_refused_before_the_server_is_asked(words, options, named):
    with pytest.raises(UsageError, match=named):
        evaluate_served("http://127.0.0.1:9", task=words, options=ServedOptions(**options))


def test_without_the_library_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(task, "find_spec", lambda name: None)
    with pytest.raises(FourfoldError, match=r"pip install 'fourfold\[evaluate\]'"):
        evaluate_served("http://127.0.0.1:9", task="lm-eval:arc_easy")

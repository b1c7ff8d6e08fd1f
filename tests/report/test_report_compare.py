"""Collecting, sorting by model, and comparing, without taking sides."""

import json

import pytest
from report_records import BASE, QUANTIZED, card, evaluation, requests, run_record, write

from fourfold.core.errors import FourfoldError, UsageError
from fourfold.core.records import Estimate
from fourfold.report.cautions import cautions, model_notes
from fourfold.report.collect import collect
from fourfold.report.commands import bench_command, evaluate_command
from fourfold.report.compare import column, columns, interval_verdict, match, score, verdict
from fourfold.report.quality import OVERALL, compared_evaluation, estimate, quality_table
from fourfold.report.study import build


def test_records_are_found_by_their_kind(results):
    write(results / "mxfp4" / "summary.json", card())  # some other JSON
    (results / "config.json").write_text('{"kind": "fourfold.checkpoint/1"}')
    collection = collect([results, results / "base"])  # nested folders count once
    assert (len(collection.runs), len(collection.evaluations), collection.other_files) == (6, 1, 2)
    assert collection.runs[0][0].startswith("results/")


def test_what_is_no_folder_of_records_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is no folder"):
        collect([tmp_path / "nowhere"])
    with pytest.raises(UsageError, match="No records in"):
        collect([tmp_path])


def test_broken_records_are_errors_not_gaps(tmp_path):
    values = json.loads(evaluation().model_dump_json())
    (tmp_path / "a.json").write_text(json.dumps(values | {"surprise": 1}))
    with pytest.raises(FourfoldError, match="its field 'surprise' does not fit"):
        collect([tmp_path])
    (tmp_path / "a.json").write_text(json.dumps(values)[:-5])
    with pytest.raises(FourfoldError, match="is not readable as JSON"):
        collect([tmp_path])


def test_models_are_told_apart_and_the_base_comes_first(results):
    study = build(collect([results]))
    assert [s.label for s in study.subjects] == ["model · bf16", "model-mxfp4"]
    assert study.base is study.subjects[0] and study.others == [study.subjects[1]]
    assert study.base.card == BASE


def test_without_evaluation_the_base_has_most_bits(tmp_path):
    write(tmp_path / "a" / "a.json", run_record(QUANTIZED, requests(0.1, 0.01)))
    write(tmp_path / "b" / "b.json", run_record(BASE, requests(0.1, 0.01)))
    base = build(collect([tmp_path])).base
    assert base is not None and base.card == BASE


def test_a_single_model_has_no_base(tmp_path):
    write(tmp_path / "b.json", run_record(BASE, requests(0.1, 0.01)))
    study = build(collect([tmp_path]))
    assert study.base is None and study.others == []


def test_equal_names_get_labels_of_their_own(tmp_path):
    for i, size in enumerate((600_000, 700_000)):
        write(tmp_path / f"{i}.json", run_record(card("m", "mxfp4", size), requests(0.1, 0.01)))
    assert [s.label for s in build(collect([tmp_path])).subjects] == ["m · mxfp4 (1)", "m · mxfp4 (2)"]


def test_ratios_by_hand(results):
    study = build(collect([results]))
    [subject] = study.others
    tpot = score(subject, study.base, "tpot_ms_p50")
    # 20 against 40 ms and 75 against 50 ms; the excluded load of eight users takes no part
    assert [round(m.ratio, 6) for m in tpot.matches] == [0.5, 1.5]
    assert tpot.mean_ratio == pytest.approx((0.5 * 1.5) ** 0.5)
    assert (tpot.count("better"), tpot.count("equal"), tpot.count("worse")) == (1, 0, 1)
    assert (tpot.best.point.concurrency, tpot.worst.point.concurrency) == (1, 4)
    assert (tpot.verdict, tpot.lowest_ratio, tpot.highest_ratio) == (
        "mixed",
        pytest.approx(0.5),
        pytest.approx(1.5),
    )
    throughput = match(subject, study.base, column("output_throughput_tok_s"))
    assert all(
        m.verdict == ("better" if m.ratio > 1 else "worse") for m in throughput if abs(m.ratio - 1) > 0.02
    )


@pytest.mark.parametrize(
    ("ratio", "better", "expected"),
    [
        (1.5, "higher", "better"),
        (0.5, "higher", "worse"),
        (1.5, "lower", "worse"),
        (0.5, "lower", "better"),
        (1.01, "higher", "equal"),
        (0.99, "lower", "equal"),
    ],
)
def test_verdicts_know_which_direction_is_good(ratio, better, expected):
    assert verdict(ratio, better) == expected


def test_an_interval_that_holds_one_is_no_difference():
    assert interval_verdict(Estimate(value=1.05, low=0.99, high=1.1), "lower") == "no clear difference"
    assert interval_verdict(Estimate(value=1.05, low=1.01, high=1.1), "lower") == "worse"
    assert interval_verdict(Estimate(value=0.9, low=0.85, high=0.95), "lower") == "better"


def test_repeated_runs_count_by_their_median(tmp_path):
    for i, step in enumerate((0.01, 0.02, 0.09)):
        write(tmp_path / f"{i}" / "chat-c1.json", run_record(BASE, requests(0.1, step)))
    study = build(collect([tmp_path]))
    [subject] = study.subjects
    assert subject.value(subject.points()[0], "tpot_ms_p50") == pytest.approx(20)
    assert not any("measured once" in text for text in cautions(study))


def test_cautions_are_found_in_the_records(results):
    other = run_record(BASE, requests(0.1, 0.01)).machine.model_copy(
        update={"cpu": "Other CPU", "versions": {}}
    )
    write(results / "x.json", run_record(None, requests(0.1, 0.01), name="stranger", machine=other))
    text = " ".join(cautions(build(collect([results]))))
    for words in (
        "2 different machines",
        "different versions of the software",
        "Each load was measured once",
        "1 of 7 runs had more than 10 % errors",
        "The server of stranger does not tell what it serves",
    ):
        assert words in text


def test_a_clean_study_has_few_cautions(results):
    (results / "mxfp4" / "chat-c8.json").unlink()
    study = build(collect([results]))
    assert len(cautions(study)) == 1
    [(note, subjects)] = model_notes(study).items()
    assert "once rounded" in note and len(subjects) == 2


def test_quality_of_the_base_comes_from_evaluations_against_it(results):
    study = build(collect([results]))
    base, quantized = study.subjects
    assert estimate(base, study, "perplexity", OVERALL).value == 11.5
    assert estimate(base, study, "kl_divergence", OVERALL) is None
    assert estimate(quantized, study, "kl_divergence", "prose").value == pytest.approx(0.04321 * 1.1)
    assert quality_table(study).texts == [OVERALL, "prose", "code"]
    alone = evaluation(created="2026-02-01T00:00:00+00:00", base=None)
    write(results / "later.json", alone)
    study = build(collect([results]))
    assert compared_evaluation(study.subjects[1], study.base).base == BASE


def test_commands_can_be_typed(results):
    run = run_record(BASE, requests(0.1, 0.01), target="a model; rm -rf /")
    assert bench_command(run) == (
        "fourfold bench 'a model; rm -rf /' --profile chat --concurrency 1 --scale 0.125 "
        "--requests 4 --warmup 1 "
        "--seed 0 --out DIR"
    )
    assert evaluate_command(evaluation()).startswith(
        "fourfold evaluate model-mxfp4 --against model --gate kl_"
    )


def test_every_column_is_known():
    assert {c.key for c in columns()} >= {"ttft_ms_p99", "output_throughput_tok_s", "user_speed_tok_s_p10"}
    assert column("ttft_ms_p99").title == "Time to first token (TTFT), p99"

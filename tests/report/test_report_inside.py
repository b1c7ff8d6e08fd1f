"""What stands behind the overall figures on the page: tasks, positions, layers; all equal to the records."""

import pytest
from report_records import BASE, QUANTIZED, evaluation, long_context, picture, scores, write
from test_report_page import NASTY, page_of

from fourfold.core.records import Estimate
from fourfold.report.collect import collect
from fourfold.report.study import build


@pytest.fixture
def inside(tmp_path):
    """A folder with one evaluation of each kind."""
    folder = tmp_path / "results"
    write(folder / "quality.json", evaluation().model_copy(update={"layers": picture()}))
    write(folder / "long.json", long_context())
    write(folder / "he.json", scores())
    return folder


def test_every_figure_is_on_the_page(inside):
    page = page_of(inside)
    shown = set(page.values)
    for position in long_context().positions:
        assert {position.loss.value, position.loss_base.value, position.loss_increase.value} <= shown
    for error in picture().layers:
        assert {error.own_error, error.built_up_error, error.kl_divergence.value} <= shown
    assert scores().scores[0].value.value in shown
    for words in (
        "Where the damage is",
        "Loss by position",
        "Tasks",
        "1 norms differ <b>",
        "Sandbox: own process.",
    ):
        assert words in page.text
    assert (
        "fourfold evaluate http://h:1 --task humaneval --samples 1 --temperature 0.0 --max-tokens 99"
        in page.text
    )
    assert "--task longcontext" in page.text and "--layers" in page.text


def test_the_layer_chart_holds_the_records(inside):
    views = {view["key"]: view for view in page_of(inside).charts["layers"]}
    assert set(views) == {"kl_divergence", "own_error", "built_up_error", "sqnr_db-0"}
    layers = picture().layers
    [kl] = views["kl_divergence"]["series"]
    assert kl["points"] == [[e.layer, e.kl_divergence.value] for e in layers]
    assert views["own_error"]["series"][0]["points"] == [[e.layer, 100 * e.own_error] for e in layers]
    by_kind = {line["name"]: line["points"] for line in views["sqnr_db-0"]["series"]}
    assert by_kind == {"up_proj": [[0, 19.17], [1, 20.17]], "down_proj": [[0, 19.17], [1, 20.17]]}


def test_weights_of_several_models_are_views_of_their_own(inside):
    other = evaluation(QUANTIZED.model_copy(update={"name": "other"})).model_copy(
        update={"layers": picture()}
    )
    write(inside / "other.json", other)
    views = page_of(inside).charts["layers"]
    assert [len(view["series"]) for view in views] == [2, 2, 2, 2, 2]  # models, then kinds of linears
    weights = [view for view in views if view["key"].startswith("sqnr_db")]
    assert len({view["title"] for view in weights}) == len({view["key"] for view in weights}) == 2
    assert all({line["name"] for line in view["series"]} == {"up_proj", "down_proj"} for view in weights)


def test_a_newer_evaluation_by_position_does_not_stand_for_quality(inside):
    newer = long_context().model_copy(update={"created": "2027-01-01T00:00:00+00:00"})
    write(inside / "newer.json", newer)
    study = build(collect([inside]))
    [subject] = study.others
    assert subject.evaluation is not None and subject.evaluation.task == "heldout"


def test_rare_tokens_are_a_metric_with_the_bases_own_loss(tmp_path):
    def estimate(value: float) -> Estimate:
        return Estimate(value=value, low=value - 0.1, high=value + 0.1)

    tail = {"tail_tokens": 99, "tail_loss": estimate(6.5), "tail_loss_base": estimate(6.1)}
    record = evaluation()
    overall = record.overall.model_copy(update=tail | {"tail_loss_increase": estimate(0.4)})
    write(tmp_path / "r" / "q.json", record.model_copy(update={"overall": overall}))
    page = page_of(tmp_path / "r")
    rows = {
        (r["metric"], r["subject"]): r["value"]
        for r in page.charts["quality"]["rows"]
        if "tail" in r["metric"]
    }
    assert rows == {("tail_loss", 0): 6.1, ("tail_loss", 1): 6.5, ("tail_loss_increase", 1): 0.4}
    assert {6.5} <= set(page.values)


@pytest.mark.parametrize("model", [None, QUANTIZED, BASE])
def test_scores_alone_make_a_page(tmp_path, model):
    write(tmp_path / "r" / "s.json", scores(model, NASTY))
    page = page_of(tmp_path / "r")
    assert NASTY in page.text and page.charts["layers"] == []
    assert not any(tag == "img" for tag, _ in page.elements)

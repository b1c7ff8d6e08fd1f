"""The page: whole in itself, harmless, and equal to the records."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import typer
from report_records import BASE, NOTE, QUANTIZED, card, evaluation, requests, run_record, write
from typer.testing import CliRunner

from fourfold.cli.report import report
from fourfold.core.errors import FourfoldError, UsageError
from fourfold.report import write_report
from fourfold.report.charts import embed
from fourfold.report.collect import collect
from fourfold.report.page import TABLE_COLUMNS, asset

NASTY = "</script><script>alert('x')</script><img src=x onerror=alert(1)>\"'&{{7*7}}"


class Page(HTMLParser):
    """What a browser would see: elements, the values of ``data`` elements, script contents, all text."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.values: list[float] = []
        self.scripts: list[str] = []
        self.text = ""
        self._open: str | None = None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "data":
            self.values.append(float(dict(attrs)["value"]))
        if tag in ("script", "style"):
            self._open = tag
            if tag == "script":
                self.scripts.append("")

    def handle_endtag(self, tag):
        if tag == self._open:
            self._open = None

    def handle_data(self, data):
        if self._open == "script":
            self.scripts[-1] += data
        elif self._open is None:
            self.text += data

    @property
    def charts(self) -> dict:
        return json.loads(self.scripts[0])


def page_of(folder) -> Page:
    target = folder.parent / "page.html"
    write_report([folder], target)
    return Page(target.read_text())


def test_the_page_asks_for_nothing(results):
    page = page_of(results)
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "img")
        assert "src" not in attributes and "srcset" not in attributes and "style" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("href", "#").startswith("#")
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    own = asset("style.css") + asset("page.js")
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttpRequest|innerHTML|eval\(", own)
    assert (results.parent / "page.html").stat().st_size < 1_300_000


def test_names_from_outside_are_harmless(tmp_path):
    bad = card(NASTY, "mxfp4", architecture=NASTY, notes=[NASTY])
    write(tmp_path / "r" / "a.json", evaluation(model=bad, texts={NASTY: evaluation().overall}, method=NASTY))
    write(
        tmp_path / "r" / "b.json",
        run_record(bad, requests(0.1, 0.01), profile=NASTY, target=NASTY, notes=[NASTY]),
    )
    write(tmp_path / "r" / "c.json", run_record(None, requests(0.1, 0.01), name=NASTY))
    page = page_of(tmp_path / "r")
    assert len(page.scripts) == 3 and not any(tag == "img" for tag, _ in page.elements)
    assert page.text.count(NASTY) >= 8  # shown as written, in every place
    assert any(NASTY in subject["label"] for subject in page.charts["subjects"])


def test_embedded_json_survives_any_text():
    data = {"a": [NASTY, "\u2028", "<!--", "]]>"], "b": 1.5}
    text = embed(data)
    assert json.loads(text) == data and not set("<>&\u2028") & set(text)
    with pytest.raises(ValueError, match="not JSON compliant"):
        embed({"a": float("nan")})


def test_numbers_shown_are_those_of_the_records(results):
    page = page_of(results)
    shown = set(page.values)
    collection = collect([results])
    for _, run in collection.runs:
        figures = {run.metrics[key] for key in TABLE_COLUMNS}
        assert (figures <= shown) is not run.excluded
    [(_, record)] = collection.evaluations
    for quality in [record.overall, *record.texts.values()]:
        assert quality.perplexity.value in shown and quality.perplexity_base.value in shown
        assert quality.kl_divergence.value in shown and quality.top1_agreement.value in shown
    assert {BASE.size_bytes, QUANTIZED.size_bytes, QUANTIZED.size_bytes / BASE.size_bytes} <= shown
    assert all(gate.value in shown for gate in record.gates)


def test_charts_hold_the_records(results):
    charts = page_of(results).charts
    runs = {(r.model.name, r.settings.concurrency): r for _, r in collect([results]).runs}
    names = ["model", "model-mxfp4"]
    for entry in charts["load"]:
        run = runs[names[entry["subject"]], entry["concurrency"]]
        if run.excluded:
            assert entry["excluded"] == run.error_rate and "values" not in entry
        else:
            assert entry["values"] == run.metrics
    assert len(charts["load"]) == 6 and len(charts["curves"]) == 5
    curve = next(c for c in charts["curves"] if c["subject"] == 1 and c["concurrency"] == 1)
    assert curve["metrics"]["tpot_ms"][50] == pytest.approx(
        runs["model-mxfp4", 1].metrics["tpot_ms_p50"], rel=1e-4
    )
    assert {m["key"] for m in charts["quality"]["metrics"]} == {
        "perplexity",
        "perplexity_ratio",
        "kl_divergence",
        "top1_agreement",
    }


def test_the_page_takes_no_side(results):
    text = " ".join(page_of(results).text.split())
    assert NOTE in text.split("Summary", 2)[1]  # above the first figure
    assert "0.50× ▲ better" in text and "1.50× ▼ worse" in text
    assert "excluded: more than 10 % errors. The first: HTTP 503: too <busy>" in text
    assert "✓ kept" in text and "✗ not kept" in text
    assert "at most 0.05" in text and "at least 0.9" in text
    assert "+7.34 %" in text and "12.35" in text


def test_how_numbers_were_obtained_is_said(results):
    text = page_of(results).text
    for words in ("Test CPU", "16.0 GiB", "fourfold 0", "fourfold bench http://h:1 --profile chat", "a note"):
        assert words in text
    assert "--window-tokens 512 --max-tokens-per-text 4096" in text
    for words in ("(end-to-end - TTFT) / (output tokens - 1)", "windows that do not overlap", "nats/token"):
        assert words in text


def test_same_records_same_bytes(results):
    page_of(results)
    first = (results.parent / "page.html").read_bytes()
    page_of(results)
    assert (results.parent / "page.html").read_bytes() == first


@pytest.mark.parametrize("kept", ["base/chat-c1.json", "mxfp4/chat-c8.json", "mxfp4/quality.json"])
def test_partial_results_make_a_page_too(results, tmp_path, kept):
    (tmp_path / "one").mkdir()
    shutil.copy(results / kept, tmp_path / "one" / "r.json")
    page = page_of(tmp_path / "one")
    sections = {a.get("id") for tag, a in page.elements if tag == "section"}
    assert ("quality" in sections) == ("quality" in kept) and ("speed" in sections) == ("chat" in kept)


def test_an_evaluation_without_base_and_a_request_of_one_token(tmp_path):
    write(tmp_path / "r" / "a.json", evaluation(base=None, gates=[]))
    made = [
        r.model_copy(update={"token_times_s": r.token_times_s[:1], "output_tokens": 1})
        for r in requests(1, 1)
    ]
    write(tmp_path / "r" / "b.json", run_record(None, made))
    assert "Gates" not in page_of(tmp_path / "r").text


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium to draw the charts with")
def test_charts_are_drawn_in_a_browser(results, tmp_path):
    write(results / "nasty.json", run_record(None, requests(0.1, 0.01), name=NASTY))
    page_of(results)
    options = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --dump-dom"
    )
    command = ["chromium", *options.split(), f"--user-data-dir={tmp_path}/profile", "--window-size=1000,800"]
    dom = subprocess.run(
        [*command, (results.parent / "page.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    assert 'class="scripted"' in dom and dom.count("<svg") >= 3
    drawn = Page(dom)
    assert len(drawn.scripts) == 3 and not any(tag == "img" for tag, _ in drawn.elements)


def test_the_verb(results, tmp_path):
    app = typer.Typer()
    app.command()(report)
    result = CliRunner().invoke(app, [str(results), "-o", str(tmp_path / "new" / "page.html")])
    assert result.exit_code == 0 and "models 2, evaluations 1, runs 6" in " ".join(result.output.split())
    error = CliRunner().invoke(app, [str(results), "-o", str(tmp_path)]).exception
    assert isinstance(error, UsageError) and "is a folder" in str(error)
    error = CliRunner().invoke(app, [str(results), "-o", f"{__file__}/page.html"]).exception
    assert isinstance(error, FourfoldError) and "page.html cannot be used" in str(error)

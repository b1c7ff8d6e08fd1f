"""One page, whole in itself: text, tables, style, script and charts in a single HTML file that asks for
nothing.

Every figure is computed here from records and written with its full value in a ``data`` element, so that
the page can be checked against the records. Everything that comes from a record is escaped; the page's own
policy (Content-Security-Policy) forbids any request to elsewhere.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fourfold.bench import metrics_in_order
from fourfold.core.durable import write_file, writing
from fourfold.report import commands
from fourfold.report.cautions import cautions, model_notes
from fourfold.report.charts import chart_data, embed, profile_title, profiles_of
from fourfold.report.collect import Collection, collect
from fourfold.report.compare import EQUAL_WITHIN, column, columns, interval_verdict, match, score, scores
from fourfold.report.environment import asset, page_environment
from fourfold.report.layers import by_position, layer_errors
from fourfold.report.quality import METRICS, compared_evaluation, quality_table
from fourfold.report.study import Study, build, formats

TABLE_COLUMNS = (
    "output_throughput_tok_s",
    "total_throughput_tok_s",
    "user_speed_tok_s_p50",
    "ttft_ms_p50",
    "ttft_ms_p90",
    "ttft_ms_p99",
    "tpot_ms_p50",
    "tpot_ms_p99",
    "itl_ms_p50",
    "itl_ms_p99",
    "e2e_ms_p50",
    "e2e_ms_p99",
)


def write_report(folders: Sequence[Path], page: Path) -> Study:
    """Read the records under ``folders`` and write the page.

    Raises what ``collect`` raises, and FourfoldError when the page cannot be written.
    """
    collection = collect(folders)
    study = build(collection)
    html = render(study, collection)
    with writing(page):
        page.parent.mkdir(parents=True, exist_ok=True)
        write_file(page, html)
    return study


def render(study: Study, collection: Collection) -> str:
    """The page's HTML; the same records give the same bytes."""
    return page_environment().get_template("page.html").render(context(study, collection))


def context(study: Study, collection: Collection) -> dict[str, Any]:
    """What the templates may use."""
    quality = quality_table(study)
    created = [
        record.created for _, record in [*collection.evaluations, *collection.runs, *collection.scores]
    ]
    return {
        "study": study,
        "base": study.base,
        "quality": quality,
        "quality_metrics": METRICS,
        "at_least": {m.key for m in METRICS if m.better == "higher"},
        "by_position": by_position(study),
        "layer_errors": layer_errors(study),
        "profiles": profiles_of(study),
        "profile_title": profile_title,
        "table_columns": [column(key) for key in TABLE_COLUMNS],
        "all_columns": columns(),
        "metrics": metrics_in_order(),
        "cautions": cautions(study),
        "model_notes": model_notes(study),
        "formats": formats,
        "score": score,
        "scores": scores,
        "match": match,
        "column": column,
        "interval_verdict": interval_verdict,
        "compared_evaluation": compared_evaluation,
        "equal_within": EQUAL_WITHIN,
        "commands": commands,
        "other_files": collection.other_files,
        "first": min(created),
        "last": max(created),
        "data": Markup(embed(chart_data(study, quality))),
        "script": Markup(asset("page.js")),
    }

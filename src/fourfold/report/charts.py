"""What the page's charts draw, as one JSON document: every value a person can choose, computed here and not
there.

The page's script only selects and draws; it derives no figure.
"""

import json
from typing import Any

import numpy as np

from fourfold.bench import metrics_in_order
from fourfold.core.records import Estimate
from fourfold.report.compare import columns
from fourfold.report.layers import layer_views
from fourfold.report.quality import METRICS, OVERALL, QualityTable
from fourfold.report.study import Point, Study, Subject

CURVE_POINTS = 101
"""Percentiles 0 to 100 of each distribution: enough to draw it, without every token in the page."""


def chart_data(study: Study, quality: QualityTable | None) -> dict[str, Any]:
    """Everything the charts need; subjects and profiles are referred to by their index."""
    profiles = profiles_of(study)
    return {
        "subjects": [{"label": s.label, "base": s is study.base} for s in study.subjects],
        "profiles": [profile_title(p) for p in profiles],
        "columns": [
            {
                "key": c.key,
                "metric": c.metric.name,
                "title": c.metric.title,
                "unit": c.metric.unit,
                "better": c.metric.better,
                "statistic": c.statistic,
            }
            for c in columns()
            if c.metric.name != "error_rate"
        ],
        "load": load_points(study, profiles),
        "curves": curves(study, profiles),
        "quality": quality_data(study, quality),
        "layers": layer_views(study),
    }


def profiles_of(study: Study) -> list[Point]:
    """One point for each profile and its lengths; its concurrency is 0 and means any."""
    return sorted({Point(p.profile, p.input_tokens, p.output_tokens, 0) for p in study.points()})


def profile_title(profile: Point) -> str:
    """A profile with its lengths."""
    return f"{profile.profile}: {profile.input_tokens} tokens in, {profile.output_tokens} out"


def load_points(study: Study, profiles: list[Point]) -> list[dict[str, Any]]:
    """Every load of every subject, excluded ones with their error rate and no values."""
    found = []
    for index, subject in enumerate(study.subjects):
        for point in study.points():
            runs, excluded = subject.runs_at(point), subject.runs_at(point, excluded=True)
            entry: dict[str, Any] = {
                "subject": index,
                "profile": profile_index(profiles, point),
                "concurrency": point.concurrency,
                "runs": len(runs),
            }
            if runs:
                values = {c.key: subject.value(point, c.key) for c in columns()}
                found.append(entry | {"values": {k: v for k, v in values.items() if v is not None}})
            elif excluded:
                found.append(entry | {"excluded": max(r.error_rate for r in excluded)})
    return found


def profile_index(profiles: list[Point], point: Point) -> int:
    """Which of ``profiles`` a load belongs to."""
    return profiles.index(Point(point.profile, point.input_tokens, point.output_tokens, 0))


def curves(study: Study, profiles: list[Point]) -> list[dict[str, Any]]:
    """Percentile curves of every metric that describes requests or tokens, at every load."""
    return [
        {
            "subject": index,
            "profile": profile_index(profiles, point),
            "concurrency": point.concurrency,
            "metrics": distributions(subject, point),
        }
        for index, subject in enumerate(study.subjects)
        for point in subject.points()
    ]


def distributions(subject: Subject, point: Point) -> dict[str, list[float]]:
    """Metric -> its percentiles 0..100 over all runs at one load, to five significant digits."""
    requests = [r for run in subject.runs_at(point) for r in run.requests]
    percentiles = np.linspace(0, 100, CURVE_POINTS)
    found = {}
    for metric in metrics_in_order():
        values = metric.values(requests) if metric.statistics else []
        if len(values):
            found[metric.name] = [float(f"{v:.5g}") for v in np.percentile(values, percentiles)]
    return found


def quality_data(study: Study, quality: QualityTable | None) -> dict[str, Any] | None:
    """Values with intervals for each quality metric, text and subject."""
    if quality is None:
        return None
    rows = []
    for metric in METRICS:
        for text in quality.texts:
            for subject, estimate in quality.estimates(metric.key, text):
                index = study.subjects.index(subject)
                rows.append({"metric": metric.key, "text": text, "subject": index} | interval(estimate))
    shown = {row["metric"] for row in rows}
    return {
        "texts": quality.texts,
        "overall": OVERALL,
        "metrics": [vars(m) for m in METRICS if m.key in shown],
        "rows": rows,
    }


def interval(estimate: Estimate) -> dict[str, float]:
    """An estimate's three numbers."""
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def embed(data: dict[str, Any]) -> str:
    """JSON that is safe inside a script element, whatever names it holds. Raises ValueError for NaN."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII only, so no U+2028 either
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")

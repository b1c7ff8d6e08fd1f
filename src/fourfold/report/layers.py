"""What lies behind the overall figures: loss by position, errors by layer, as the page's tables and chart."""

from typing import Any

from fourfold.core.records import EvaluationRecord, LayerPicture, LinearError
from fourfold.report.study import Study, Subject

WEIGHTS = "sqnr_db"
VIEWS = {
    "kl_divergence": (
        "KL of one layer alone",
        "nats/token",
        "Mean KL(base || base with only this layer the model's): what the layer costs in the end.",
    ),
    "own_error": (
        "Error of one layer alone",
        "%",
        "Mean over tokens of the distance between the states behind the layer, the model's and the base's, "
        "over the base's size, when both read the base's states.",
    ),
    "built_up_error": (
        "Error built up",
        "%",
        "The same distance when all layers up to here are the model's.",
    ),
    WEIGHTS: (
        "Signal to rounding noise of weights",
        "dB",
        "-20 log10 of |rounded - original| / |original| for each quantized weight: higher is closer. Passes "
        "that look at what a layer computes (GPTQ, AWQ, training) move weights further on purpose.",
    ),
}


def by_position(study: Study) -> list[tuple[Subject, EvaluationRecord]]:
    """The newest evaluation by position of each subject that has one."""
    found = [(s, [r for _, r in s.evaluations if r.positions]) for s in study.subjects]
    return [(subject, records[-1]) for subject, records in found if records]


def layer_errors(study: Study) -> list[tuple[Subject, LayerPicture]]:
    """The newest layer picture of each subject that has one."""
    found = [(s, [r.layers for _, r in s.evaluations if r.layers]) for s in study.subjects]
    return [(subject, pictures[-1]) for subject, pictures in found if pictures]


def layer_views(study: Study) -> list[dict[str, Any]]:
    """What the layer chart can show: for each view its series of (layer, value). Weights have a view for each
    subject: all kinds of linears of all subjects would be too many series to tell apart."""
    pictures = layer_errors(study)
    views = [view(key, layers(study, pictures, key)) for key in VIEWS if key != WEIGHTS]
    for place, (subject, picture) in enumerate(pictures):
        whose = f": {subject.label}" if len(pictures) > 1 else ""
        views.append(view(WEIGHTS, weights(picture), f"-{place}", whose))
    return [found for found in views if found["series"]]


def view(key: str, series: list[dict], place: str = "", whose: str = "") -> dict[str, Any]:
    """One of VIEWS with its series; ``place`` and ``whose`` tell those of several subjects apart."""
    title, unit, definition = VIEWS[key]
    return {
        "key": key + place,
        "title": title + whose,
        "unit": unit,
        "definition": definition,
        "series": series,
    }


def layers(study: Study, pictures: list[tuple[Subject, LayerPicture]], key: str) -> list[dict]:
    """A series per subject; shares in percent."""
    return [
        {
            "name": subject.label,
            "style": study.subjects.index(subject),
            "points": [
                [e.layer, e.kl_divergence.value if key == "kl_divergence" else 100 * getattr(e, key)]
                for e in picture.layers
            ],
        }
        for subject, picture in pictures
    ]


def weights(picture: LayerPicture) -> list[dict]:
    """A series per kind of linear; of several experts in one layer, all stand there."""
    found: dict[str, list] = {}
    for error in picture.linears:
        if error.layer is not None and error.sqnr_db is not None:
            found.setdefault(kind(error), []).append([error.layer, error.sqnr_db])
    return [{"name": name, "style": i, "points": points} for i, (name, points) in enumerate(found.items())]


def kind(error: LinearError) -> str:
    """q_proj, down_proj...: the last part of a linear's name."""
    return error.name.rpartition(".")[2]

"""What lies behind the overall figures: loss by position, errors by layer, as the page's tables and chart."""

from typing import Any

from fourfold.core.records import EvaluationRecord, LayerPicture, LinearError
from fourfold.report.study import Study, Subject

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
    "sqnr_db": (
        "Signal to rounding noise of weights",
        "dB",
        "-20 log10 of |rounded - original| / |original| for each quantized weight: higher is closer.",
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
    """What the layer chart can show: for each view its series of (layer, value)."""
    pictures = layer_errors(study)
    views = []
    for key, (title, unit, definition) in VIEWS.items():
        lines = weights(study, pictures) if key == "sqnr_db" else layers(study, pictures, key, unit)
        if lines:
            views.append(
                {"key": key, "title": title, "unit": unit, "definition": definition, "series": lines}
            )
    return views


def layers(study: Study, pictures: list[tuple[Subject, LayerPicture]], key: str, unit: str) -> list[dict]:
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


def weights(study: Study, pictures: list[tuple[Subject, LayerPicture]]) -> list[dict]:
    """A series per kind of linear; of several experts in one layer, all stand there."""
    found: dict[str, list] = {}
    for subject, picture in pictures:
        for error in picture.linears:
            if error.layer is not None and error.sqnr_db is not None:
                name = kind(error) if len(pictures) == 1 else f"{kind(error)} · {subject.label}"
                found.setdefault(name, []).append([error.layer, error.sqnr_db])
    return [{"name": name, "style": i, "points": points} for i, (name, points) in enumerate(found.items())]


def kind(error: LinearError) -> str:
    """q_proj, down_proj...: the last part of a linear's name."""
    return error.name.rpartition(".")[2]

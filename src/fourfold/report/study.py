"""Records sorted by model: which models there are, which of them is the base, and what was measured on
each.

A model is what its card says: name, formats and size together, so that a checkpoint and its quantized form
never fall together. A run whose server told no card stands under the name the server answers to, without
size or format.
"""

from collections import Counter
from dataclasses import dataclass, field
from statistics import median

from fourfold.core.records import EvaluationRecord, Machine, ModelCard, RunRecord, ScoresRecord
from fourfold.report.collect import Collection

Key = tuple[object, ...]


@dataclass(frozen=True, order=True)
class Point:
    """One load: the same for every model, so that values measured at it can be compared."""

    profile: str
    input_tokens: int
    output_tokens: int
    concurrency: int


@dataclass
class Subject:
    """A model and everything that was measured on it, with the files."""

    key: Key
    name: str
    card: ModelCard | None
    label: str = ""
    evaluations: list[tuple[str, EvaluationRecord]] = field(default_factory=list)
    runs: list[tuple[str, RunRecord]] = field(default_factory=list)
    scores: list[tuple[str, ScoresRecord]] = field(default_factory=list)

    @property
    def quality(self) -> list[tuple[str, EvaluationRecord]]:
        """The evaluations on held-out text; those by position are another thing."""
        return [(file, record) for file, record in self.evaluations if not record.positions]

    @property
    def evaluation(self) -> EvaluationRecord | None:
        """The newest evaluation on held-out text."""
        return self.quality[-1][1] if self.quality else None

    def runs_at(self, point: Point, excluded: bool = False) -> list[RunRecord]:
        """The runs at one load that count, or those that do not."""
        return [r for _, r in self.runs if point_of(r) == point and r.excluded is excluded]

    def points(self) -> list[Point]:
        """Every load with a run that counts, in order."""
        return sorted({point_of(r) for _, r in self.runs if not r.excluded})

    def value(self, point: Point, key: str) -> float | None:
        """A metric at one load: the median where it was measured more than once, None where it was not."""
        values = [r.metrics[key] for r in self.runs_at(point) if key in r.metrics]
        return median(values) if values else None


@dataclass
class Study:
    """All subjects, the base first. ``base`` is None when there is nothing to compare with."""

    subjects: list[Subject]
    base: Subject | None

    @property
    def others(self) -> list[Subject]:
        """The subjects that are compared with the base."""
        return [s for s in self.subjects if s is not self.base] if self.base else []

    def points(self) -> list[Point]:
        """Every load that any subject was run at, excluded runs included."""
        return sorted({point_of(r) for s in self.subjects for _, r in s.runs})

    def machines(self) -> list[Machine]:
        """Every machine that occurs, in order of appearance."""
        found: list[Machine] = []
        for subject in self.subjects:
            for _, record in [*subject.evaluations, *subject.runs, *subject.scores]:
                if record.machine not in found:
                    found.append(record.machine)
        return found


def point_of(run: RunRecord) -> Point:
    """The load of a run."""
    s = run.settings
    return Point(s.profile, s.input_tokens, s.output_tokens, s.concurrency)


def build(collection: Collection) -> Study:
    """Sort a collection by model and find the base."""
    subjects: dict[Key, Subject] = {}

    def subject(card: ModelCard | None, name: str) -> Subject:
        key = card_key(card) if card else (name,)
        found = subjects.setdefault(key, Subject(key, name, card))
        return found

    for file, evaluation in collection.evaluations:
        subject(evaluation.model, evaluation.model.name).evaluations.append((file, evaluation))
        if evaluation.base:
            subject(evaluation.base, evaluation.base.name)
    for file, run in collection.runs:
        subject(run.model, run.model.name if run.model else run.model_name).runs.append((file, run))
    for file, scores in collection.scores:
        name = scores.model.name if scores.model else scores.model_name
        subject(scores.model, name).scores.append((file, scores))
    base = find_base(list(subjects.values()), collection)
    ordered = sorted(subjects.values(), key=lambda s: (s is not base, s.name, str(s.key)))
    label(ordered)
    return Study(ordered, base)


def card_key(card: ModelCard) -> Key:
    """What makes two cards the same model; notes do not."""
    return tuple(value for name, value in card if name != "notes")


def find_base(subjects: list[Subject], collection: Collection) -> Subject | None:
    """What most evaluations compared with; else the subject with the most bits per weight; else none."""
    if len(subjects) < 2:
        return None
    cited = Counter(card_key(e.base) for _, e in collection.evaluations if e.base)
    if cited:
        key = cited.most_common(1)[0][0]
        return next(s for s in subjects if s.key == key)
    carded = [s for s in subjects if s.card]
    return max(carded, key=lambda s: s.card.bits_per_weight if s.card else 0.0) if carded else None


def label(subjects: list[Subject]) -> None:
    """Give each subject a label of its own: its name, its format unless the name says it, else a number."""
    for subject in subjects:
        subject.label = subject.name
        if subject.card and formats(subject.card).lower() not in subject.name.lower():
            subject.label += f" · {formats(subject.card)}"
    repeated = Counter(s.label for s in subjects)
    numbers: Counter[str] = Counter()
    for subject in subjects:
        if repeated[subject.label] > 1:
            numbers[subject.label] += 1
            subject.label += f" ({numbers[subject.label]})"


def formats(card: ModelCard) -> str:
    """Formats of weights and, where they are not kept, of activations and KV cache."""
    parts = [card.weight_format]
    parts += [f"activations {card.activation_format}"] if card.activation_format else []
    parts += [f"KV {card.kv_cache_format}"] if card.kv_cache_format else []
    return ", ".join(parts)

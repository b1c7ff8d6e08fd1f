"""Quality as the page shows it: per text and over all, model beside base, with intervals."""

from collections.abc import Iterator
from dataclasses import dataclass

from fourfold.core.records import Estimate, EvaluationRecord, TextQuality
from fourfold.report.study import Study, Subject, card_key

OVERALL = "all texts"


@dataclass(frozen=True)
class QualityMetric:
    """One measure of quality and the sentence that defines it."""

    key: str
    title: str
    unit: str
    better: str
    definition: str


METRICS = (
    QualityMetric(
        "perplexity",
        "Perplexity",
        "",
        "lower",
        "The exponential of the mean negative log-likelihood per token of held-out text. "
        "Comparable between models "
        "only with the same tokenizer, texts and window.",
    ),
    QualityMetric(
        "perplexity_ratio",
        "Perplexity against the base",
        "×",
        "lower",
        "Perplexity of the model divided by that of the base on the same windows; the "
        "interval is of the paired "
        "difference, so it is narrower than the two intervals beside each other suggest.",
    ),
    QualityMetric(
        "kl_divergence",
        "KL divergence from the base",
        "nats/token",
        "lower",
        "Mean Kullback-Leibler divergence KL(base || model) of the next-token distributions; "
        "0 when they are equal.",
    ),
    QualityMetric(
        "top1_agreement",
        "Top-1 agreement with the base",
        "%",
        "higher",
        "Share of positions at which model and base hold the same token most likely.",
    ),
    QualityMetric(
        "tail_loss",
        "Loss on rare tokens",
        "nats/token",
        "lower",
        "Mean negative log-likelihood of the tokens that are rarest in the texts, a tenth of "
        "the scored. Comparable between models only with the same tokenizer and texts.",
    ),
    QualityMetric(
        "tail_loss_increase",
        "Loss on rare tokens, against the base",
        "nats/token",
        "lower",
        "Loss on rare tokens less that of the base on the same ones; the interval is of the paired "
        "difference.",
    ),
)


@dataclass(frozen=True)
class QualityRow:
    """One text of one evaluation."""

    subject: Subject
    file: str
    record: EvaluationRecord
    text: str
    quality: TextQuality

    @property
    def overall(self) -> bool:
        """Whether this row is over all texts."""
        return self.text == OVERALL


@dataclass(frozen=True)
class QualityTable:
    """All evaluations, and for charts the newest of each subject."""

    study: Study
    rows: list[QualityRow]
    texts: list[str]

    def estimates(self, key: str, text: str) -> Iterator[tuple[Subject, Estimate]]:
        """The newest value of a metric on a text for each subject that has one."""
        for subject in self.study.subjects:
            found = estimate(subject, self.study, key, text)
            if found:
                yield subject, found


def quality_table(study: Study) -> QualityTable | None:
    """The table, or None without evaluations."""
    rows = [
        QualityRow(subject, file, record, text, quality)
        for subject in study.subjects
        for file, record in subject.quality
        for text, quality in [(OVERALL, record.overall), *record.texts.items()]
    ]
    texts = list(dict.fromkeys(row.text for row in rows))
    return QualityTable(study, rows, texts) if rows else None


def estimate(subject: Subject, study: Study, key: str, text: str) -> Estimate | None:
    """A metric of ``subject`` on ``text``; the base's own losses are also known from evaluations against
    it."""
    own = on_text(subject.evaluation, text)
    if own is not None:
        return getattr(own, key)
    known_of_base = {"perplexity": "perplexity_base", "tail_loss": "tail_loss_base"}
    if key not in known_of_base:
        return None
    citing = [e for s in study.subjects for _, e in s.quality if e.base and card_key(e.base) == subject.key]
    found = on_text(citing[-1], text) if citing else None
    return getattr(found, known_of_base[key]) if found else None


def on_text(record: EvaluationRecord | None, text: str) -> TextQuality | None:
    """The part of a record that is about ``text``."""
    if record is None:
        return None
    return record.overall if text == OVERALL else record.texts.get(text)


def compared_evaluation(subject: Subject, base: Subject) -> EvaluationRecord | None:
    """The newest evaluation of ``subject`` against ``base``, else its newest of all."""
    against = [e for _, e in subject.quality if e.base and card_key(e.base) == base.key]
    return against[-1] if against else subject.evaluation

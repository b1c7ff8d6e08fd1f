"""What a reader must know before believing a comparison, found in the records themselves."""

from fourfold.report.study import Study, Subject


def cautions(study: Study) -> list[str]:
    """Sentences for the top of the page; none when there is nothing to warn of."""
    found = [*different_machines(study), *different_versions(study), *several_targets(study)]
    found += [*single_runs(study), *excluded_runs(study), *unknown_models(study)]
    return found


def different_machines(study: Study) -> list[str]:
    """Ratios of speed across machines compare machines too."""
    hardware = {(m.cpu, m.cores, m.gpu) for s in study.subjects for _, r in s.runs for m in [r.machine]}
    if len(hardware) < 2:
        return []
    return [
        f"The runs come from {len(hardware)} different machines: a ratio between models may be "
        f"a ratio between "
        "machines."
    ]


def different_versions(study: Study) -> list[str]:
    """Other software is another measurement."""
    versions = {tuple(sorted(r.machine.versions.items())) for s in study.subjects for _, r in s.runs}
    if len(versions) < 2:
        return []
    return ["The runs were made with different versions of the software; see how each number was obtained."]


def several_targets(study: Study) -> list[str]:
    """A subject measured through several servers is shown as one line."""
    return [
        f"{subject.label} was measured through several targets ({', '.join(sorted(targets))}); "
        f"where loads coincide "
        "the median is shown."
        for subject in study.subjects
        if len(targets := {r.target for _, r in subject.runs}) > 1
    ]


def single_runs(study: Study) -> list[str]:
    """Without repetition there is no spread."""
    repeats = [len(s.runs_at(p)) for s in study.subjects for p in s.points()]
    if not repeats or min(repeats) > 1:
        return []
    if max(repeats) == 1:
        return [
            "Each load was measured once. The spread between repetitions is not known, so small "
            "differences in "
            "speed may be chance."
        ]
    return [
        f"Some loads were measured once, others up to {max(repeats)} times; repeated ones show the median."
    ]


def excluded_runs(study: Study) -> list[str]:
    """How many runs have no say."""
    runs = [r for s in study.subjects for _, r in s.runs]
    excluded = sum(r.excluded for r in runs)
    if not excluded:
        return []
    return [
        f"{excluded} of {len(runs)} runs had more than 10 % errors. They are shown as excluded "
        f"and take no part in "
        "any comparison."
    ]


def unknown_models(study: Study) -> list[str]:
    """A server that does not tell what it serves."""
    return [
        f"The server of {subject.label} does not tell what it serves: its size and formats are unknown."
        for subject in study.subjects
        if subject.card is None
    ]


def model_notes(study: Study) -> dict[str, list[Subject]]:
    """What checkpoints say about themselves, such as that their weights were rounded before, and which do."""
    notes: dict[str, list[Subject]] = {}
    for subject in study.subjects:
        for note in subject.card.notes if subject.card else []:
            notes.setdefault(note, []).append(subject)
    return notes

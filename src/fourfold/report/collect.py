"""Finding the records: every JSON file under the given folders that says it is one."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from fourfold.core.errors import FourfoldError, UsageError
from fourfold.core.records import EvaluationRecord, RunRecord, ScoresRecord

KINDS: dict[str, type[EvaluationRecord] | type[RunRecord] | type[ScoresRecord]] = {
    "fourfold.evaluation/1": EvaluationRecord,
    "fourfold.scores/1": ScoresRecord,
    "fourfold.run/1": RunRecord,
}


@dataclass
class Collection:
    """All records found with the files they came from, oldest first; and how many files were something
    else."""

    evaluations: list[tuple[str, EvaluationRecord]] = field(default_factory=list)
    runs: list[tuple[str, RunRecord]] = field(default_factory=list)
    scores: list[tuple[str, ScoresRecord]] = field(default_factory=list)
    other_files: int = 0


def collect(folders: Sequence[Path]) -> Collection:
    """Read all records under ``folders``, each file once.

    Raises UsageError for a folder that is not there or when there is no record in any of them,
    FourfoldError for a file that says it is a record and is not.
    """
    collection, seen = Collection(), set()
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"{folder} is no folder. Name the folders that hold the records.")
        for path in sorted(folder.rglob("*.json")):
            if path.resolve() not in seen:
                seen.add(path.resolve())
                add(collection, path, f"{folder.resolve().name}/{path.relative_to(folder)}")
    if not collection.evaluations and not collection.runs and not collection.scores:
        raise UsageError(
            f"No records in {', '.join(map(str, folders))}. `fourfold evaluate --json` and "
            f"`fourfold bench --out` "
            "write them."
        )
    collection.evaluations.sort(key=lambda found: found[1].created)
    collection.runs.sort(key=lambda found: found[1].created)
    collection.scores.sort(key=lambda found: found[1].created)
    return collection


def add(collection: Collection, path: Path, name: str) -> None:
    """Put the record in ``path`` where it belongs."""
    record = read(path)
    if isinstance(record, EvaluationRecord):
        collection.evaluations.append((name, record))
    elif isinstance(record, RunRecord):
        collection.runs.append((name, record))
    elif isinstance(record, ScoresRecord):
        collection.scores.append((name, record))
    else:
        collection.other_files += 1


def read(path: Path) -> EvaluationRecord | RunRecord | ScoresRecord | None:
    """The record in ``path``, or None when the file does not claim to be one."""
    data = path.read_bytes()
    if b"fourfold." not in data:
        return None  # large foreign files are not parsed
    try:
        values = json.loads(data)
    except ValueError as error:
        raise FourfoldError(f"{path} is not readable as JSON ({error}). Move it away.") from error
    kind = values.get("kind") if isinstance(values, dict) else None
    if kind not in KINDS:
        return None
    try:
        return KINDS[kind].model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise FourfoldError(
            f"{path} says it is a record of kind {kind}, but its field '{where}' does not fit "
            f"({first['msg']}). It comes from another version of Fourfold or was edited; measure again or "
            "move it away."
        ) from error

"""The journal of a checkpoint being written: which shards are durable, and what the work was started with.

It lies in the work folder ``OUT.partial`` and is replaced after every shard, after that shard's bytes and
name are on disk; so whatever it lists can be trusted after a kill, once its hash is seen to match.
"""

import fcntl
import json
import os
from pathlib import Path

from pydantic import ValidationError

from fourfold.checkpoint.digests import read_digests
from fourfold.core.durable import sha256_of, sync_folder, write_file, writing
from fourfold.core.errors import FourfoldError, UsageError
from fourfold.core.manifest import read_manifest
from fourfold.core.records import Record

JOURNAL = "journal.json"
LOCK = "lock"


class JournalRecord(Record):
    """The journal's content: the fingerprint of the work, the hash of each finished shard, and the digests of
    its tensors.
    """

    fingerprint: dict[str, str]
    shards: dict[str, str] = {}
    digests: dict[str, dict[str, str]] = {}


class Journal:
    """The journal in ``work``. ``resume`` continues an interrupted one; otherwise there must be none."""

    def __init__(self, work: Path, fingerprint: dict[str, str], resume: bool):
        self.work = work
        self.record = JournalRecord(fingerprint=fingerprint)
        existed = work.is_dir()
        if not resume:
            refuse_interrupted(work)
        with writing(work):
            work.mkdir(parents=True, exist_ok=True)
            sync_folder(work.parent)
            self._lock = _lock(work)
        if existed:
            self._continue(fingerprint)
        self._write()

    def done(self) -> dict[str, str]:
        """Files that are durable, with their sha256."""
        return dict(self.record.shards)

    def digests(self) -> dict[str, dict[str, str]]:
        """By file, the digest of each tensor as it was handed to be written."""
        return dict(sorted(self.record.digests.items()))

    def add(self, file: str, sha256: str, digests: dict[str, str]) -> None:
        """Record that ``file`` is durable."""
        old = self.record
        self._replace(old.shards | {file: sha256}, old.digests | {file: digests})

    def drop(self, file: str) -> None:
        """Forget ``file``: it is not what it should be."""
        old = self.record
        self._replace({f: h for f, h in old.shards.items() if f != file}, old.digests)

    @staticmethod
    def own_files() -> tuple[str, ...]:
        """Files in the work folder that do not belong to the checkpoint."""
        return (JOURNAL, LOCK)

    def close(self) -> None:
        """Let another process work here."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def remove(self) -> None:
        """Take the journal away when all is written; the manifest stands for it from now on."""
        (self.work / JOURNAL).unlink()
        (self.work / LOCK).unlink()

    def _replace(self, shards: dict[str, str], digests: dict[str, dict[str, str]]) -> None:
        kept = {file: found for file, found in digests.items() if file in shards}
        self.record = JournalRecord(fingerprint=self.record.fingerprint, shards=shards, digests=kept)
        self._write()

    def _write(self) -> None:
        path = self.work / JOURNAL
        with writing(path):
            write_file(path, json.dumps(self.record.model_dump(), indent=2, sort_keys=True))

    def _continue(self, fingerprint: dict[str, str]) -> None:
        previous = _read(self.work)
        if previous is None:
            return
        for field in sorted(fingerprint.keys() | previous.fingerprint.keys()):
            old, new = previous.fingerprint.get(field), fingerprint.get(field)
            if old != new:
                raise UsageError(
                    f"{self.work} was started with another {field}: {old} then, {new} now. Repeat the "
                    "command as it was, or delete that folder to start anew."
                )
        # a shard that was damaged since is simply written again
        kept = {
            f: h for f, h in previous.shards.items() if f in previous.digests and _matches(self.work / f, h)
        }
        self._replace(kept, previous.digests)


def refuse_interrupted(work: Path) -> None:
    """Raise UsageError when ``work`` is there already."""
    if work.is_dir():
        raise UsageError(
            f"{work} holds the work of an interrupted run. Continue it with --resume, or delete that folder."
        )


def _matches(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path) == sha256


def _read(work: Path) -> JournalRecord | None:
    path = work / JOURNAL
    try:
        if path.is_file():
            return JournalRecord.model_validate_json(path.read_text())
        # a kill between removing the journal and renaming the folder leaves a manifest instead
        manifest = read_manifest(work)
    except (ValidationError, ValueError) as error:
        raise FourfoldError(f"{path} is damaged. Delete {work} and start anew.") from error
    if manifest is None:
        return None
    shards = {name: h for name, h in manifest.sha256.items() if name.endswith(".safetensors")}
    digests = read_digests(work)
    return JournalRecord(
        fingerprint=manifest.fingerprint, shards=shards, digests=digests.files if digests else {}
    )


def _lock(work: Path) -> int:
    # POSIX record locks belong to the process, so they vanish with it, however it dies
    handle = os.open(work / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise FourfoldError(
            f"Another process is writing into {work}. Wait for it, or name another OUT."
        ) from error
    return handle

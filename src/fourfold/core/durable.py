"""Files that are whole or absent: written beside their place, fsynced, hashed, then renamed."""

import hashlib
import os
from pathlib import Path


def write_file(path: Path, data: bytes | str) -> str:
    """Write ``data`` to ``path`` so that a crash leaves the old file or the new one. Returns its sha256."""
    payload = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)
    return hashlib.sha256(payload).hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the renames inside ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """Hash of a file's content, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

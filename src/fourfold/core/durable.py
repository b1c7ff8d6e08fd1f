"""Files that are whole or absent: written beside their place, fsynced, hashed, then renamed."""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fourfold.core.errors import FourfoldError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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


def sync_file(path: Path) -> None:
    """Make the content of ``path``, which another library wrote, durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What goes wrong on disk inside the block becomes a FourfoldError that names ``path`` and the remedy."""
    try:
        yield
    except OSError as error:
        raise file_failure(error, path) from error


def file_failure(error: OSError, path: Path | str | None = None) -> FourfoldError:
    """``error`` as one paragraph; without ``path``, the place is the one that ``error`` names, if it does."""
    place = path or error.filename2 or error.filename
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    if error.errno in FULL:
        return FourfoldError(
            f"No room for {place or 'what is being written'}: {reason}. Free some space (or raise the limit) "
            "and run the same command again: quantize and convert with --resume, which keeps what is done."
        )
    where = f"{place} cannot be used: {reason}" if place else reason
    return FourfoldError(f"{where}. Check the path and its rights, then run the same command again.")


def sha256_of(path: Path) -> str:
    """Hash of a file's content, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""The packed layouts of a model's linear layers, kept on disk beside its checkpoint.

One file, ``.fourfold-packed/layout-<version>.bin`` in the checkpoint's folder (or, where that cannot be
written, in the user's cache directory): a header that says what lies where, then the tiles as the kernels
read them, the same for every processor. The header holds size and time of every file of the checkpoint, the
version of this program, and a checksum of each weight; a file that is of another state of the checkpoint, cut
short or damaged in any place counts as none, and is written anew. It may be deleted at any time.

It is read into memory of large pages and checked on the way, by several threads, and not mapped: a mapped
file lies in small pages, which are slower to read from at every token (kernels/cpu/memory.py). The price is a
copy at the start: 0.2 s for 517 MB that the system had in its cache, two threads, the best of four.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from fourfold import __version__
from fourfold.checkpoint import Checkpoint
from fourfold.kernels import native_available, threads
from fourfold.kernels.cpu.memory import large_pages
from fourfold.kernels.cpu.packed import PackedWeight, checksum, layout_version, packed_shape

MAGIC = b"fourfold packed\n"
PREFIX = len(MAGIC) + 8 + 32  # the header's length and its sha256
ALIGNMENT = 4096
FOLDER = ".fourfold-packed"


class PackedCache:
    """``get`` what an earlier run packed, ``put`` what this one had to, ``finish`` to write it down."""

    def __init__(self, places: list[Path], state: dict[str, Any]):
        self.places, self.state = places, state
        self._held: dict[str, PackedWeight] = {}
        self._new = False

    @classmethod
    def open(cls, checkpoint: Checkpoint) -> "PackedCache":
        """The cache of ``checkpoint`` with all that it holds read and checked; an empty one if that fails."""
        files = checkpoint_files(checkpoint)
        cache = cls(possible_places(files), state_of(files))
        for place in cache.places if files and native_available() else []:
            if weights := read(place, cache.state):
                cache._held = weights
                break
        return cache

    def __len__(self) -> int:
        return len(self._held)

    def get(self, name: str) -> PackedWeight | None:
        """The weight ``name`` without a bias, or None when it has not been packed before."""
        return self._held.get(name)

    def put(self, name: str, weight: PackedWeight) -> None:
        """Keep ``weight`` under ``name``; its bias is not kept."""
        self._held[name] = PackedWeight(weight.kind, weight.n, weight.k, weight.data)
        self._new = True

    def finish(self) -> Path | None:
        """Write what there is if anything was put, and forget it. Returns the file, or None where there is
        no room or no right to write: then the next run packs again.
        """
        held, self._held = self._held, {}
        for place in self.places if self._new else []:
            try:
                write(place, self.state, held)
            except OSError:
                continue
            return place
        return None


def checkpoint_files(checkpoint: Checkpoint) -> list[Path]:
    """The files whose change makes the packed weights stale."""
    if checkpoint.folder is None:
        return [path] if (path := Path(checkpoint.source)).is_file() else []
    return sorted([*checkpoint.folder.glob("*.safetensors"), *checkpoint.folder.glob("config.json")])


def state_of(files: list[Path]) -> dict[str, Any]:
    """What the cache must have been made from to be of use."""
    stats = {path.name: (status := path.stat()) and [status.st_size, status.st_mtime_ns] for path in files}
    return {"fourfold": __version__, "layout": layout_version(), "files": stats}


def possible_places(files: list[Path]) -> list[Path]:
    """Where the cache may lie, the best first: beside the checkpoint, in the user's cache directory."""
    if not files:
        return []
    beside, name = files[0].parent, f"layout-{layout_version()}.bin"
    if files[0].suffix == ".gguf":
        name = f"{files[0].stem}-{name}"
    own = hashlib.sha256(str(beside.absolute()).encode()).hexdigest()[:16]
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [beside / FOLDER / name, user / "fourfold" / "packed" / own / name]


def write(place: Path, state: dict[str, Any], weights: dict[str, PackedWeight]) -> None:
    """The cache file ``place``, whole or not at all. Raises OSError."""
    entries, end = {}, 0
    for name, weight in weights.items():
        entries[name] = [weight.kind, weight.n, weight.k, end, checksum(weight.data)]
        end += -(-weight.data.nbytes // ALIGNMENT) * ALIGNMENT
    header = json.dumps({"state": state, "bytes": end, "weights": entries}).encode()
    start = -(-(PREFIX + len(header)) // ALIGNMENT) * ALIGNMENT
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(MAGIC + len(header).to_bytes(8, "little") + hashlib.sha256(header).digest() + header)
            for name, weight in weights.items():
                file.seek(start + entries[name][3])
                file.write(weight.data.numpy().data)
            file.truncate(start + end)
        temporary.replace(place)  # nobody waits for the disk: what a crash cuts short is found to be damaged
    finally:
        temporary.unlink(missing_ok=True)


def read(place: Path, state: dict[str, Any]) -> dict[str, PackedWeight] | None:
    """All weights of the file ``place``, or None unless it is whole and made from ``state``."""
    try:
        with place.open("rb", buffering=0) as file:
            header, start = read_header(file)
            if header is None or header["state"] != state:
                return None
            pool = large_pages(header["bytes"])
            weights = {name: cut(pool, entry) for name, entry in header["weights"].items()}

            def whole(name: str) -> bool:
                offset, expected = header["weights"][name][3:]
                data = weights[name].data
                return filled(file.fileno(), data, start + offset) and checksum(data) == expected

            with ThreadPoolExecutor(threads()) as workers:
                return weights if all(workers.map(whole, weights)) else None
    except OSError:
        return None


def read_header(file: Any) -> tuple[dict[str, Any] | None, int]:
    """The header and where the tiles begin; None for what is not a whole header."""
    prefix = file.read(PREFIX)
    length = int.from_bytes(prefix[len(MAGIC) : len(MAGIC) + 8], "little")
    if not prefix.startswith(MAGIC) or length > os.fstat(file.fileno()).st_size:
        return None, 0
    header = file.read(length)
    if hashlib.sha256(header).digest() != prefix[len(MAGIC) + 8 :]:
        return None, 0
    return json.loads(header), -(-(PREFIX + length) // ALIGNMENT) * ALIGNMENT


def cut(pool: Tensor, entry: list[Any]) -> PackedWeight:
    """The weight that ``entry`` of a header describes, in its part of ``pool``."""
    kind, n, k, offset, _ = entry
    tiles, width = packed_shape(kind, n, k)
    return PackedWeight(kind, n, k, pool[offset : offset + tiles * width].view(tiles, width))


def filled(handle: int, data: Tensor, offset: int) -> bool:
    """Whether the file held ``data`` to the last byte, which is read from ``offset``."""
    view, done = data.view(-1).numpy().data, 0
    while done < len(view):
        count = os.preadv(handle, [view[done:]], offset + done)
        if count == 0:
            return False
        done += count
    return True

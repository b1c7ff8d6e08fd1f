"""The header of a GGUF file: metadata and where each tensor lies, without mapping the file.

Layout: magic, version, counts, key-value pairs, tensor descriptions, padding, data (ggml, docs/gguf.md,
versions 2 and 3, little-endian). Written here rather than taken from the gguf package because that one makes
an object of every token (seconds for a vocabulary), keeps the file mapped, and trusts what it reads. Long
arrays are skipped.
"""

import math
import os
import struct
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import gguf

from fourfold.checkpoint.storage.header import broken, short

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
MAX_KEPT_ITEMS = 1024
MAX_NESTING = 8


@dataclass(frozen=True)
class Stored:
    """A tensor in a GGUF file: ``shape`` rows first; ``begin`` in bytes from the start of the file."""

    name: str
    type: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    begin: int
    nbytes: int


def read_header(path: Path) -> tuple[dict[str, Any], list[Stored]]:
    """Metadata (arrays of more than 1024 items left out) and tensors. Raises FourfoldError for any defect."""
    with path.open("rb") as file:
        cursor = _Cursor(path, file)
        if cursor.take(4) != MAGIC:
            raise broken(path, "it does not begin with the letters GGUF")
        if (version := cursor.number("I")) not in VERSIONS:
            raise broken(path, f"it has the GGUF version {version}; 2 and 3, little-endian, are known")
        tensor_count, pair_count = cursor.number("Q"), cursor.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = cursor.text()
            if key in metadata:
                raise broken(path, f"its metadata holds '{short(key)}' twice")
            metadata[key] = cursor.value(cursor.number("I"))
        described = [_description(cursor) for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20:
            raise broken(path, f"its alignment is {short(repr(alignment))}")
        begin = -(-file.tell() // alignment) * alignment
    return metadata, _placed(path, described, begin, cursor.size)


class _Cursor:
    """Reads forward; every length is checked against what is left before it is trusted."""

    def __init__(self, path: Path, file: BufferedReader):
        self.path, self.file = path, file
        self.size = os.fstat(file.fileno()).st_size

    def take(self, count: int) -> bytes:
        self._need(count)
        return self.file.read(count)

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError as error:
            raise broken(self.path, "a text in its header is not UTF-8") from error

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind == ARRAY and depth < MAX_NESTING:
            return self._array(depth)
        raise broken(self.path, f"its metadata has a value of the unknown type {kind}")

    def _array(self, depth: int) -> list[Any] | None:
        kind, count = self.number("I"), self.number("Q")
        if count <= MAX_KEPT_ITEMS:
            return [self.value(kind, depth + 1) for _ in range(count)]
        if kind in SCALARS:
            self._skip(count * struct.calcsize("<" + SCALARS[kind]))
        elif kind == STRING:
            for _ in range(count):
                self._skip(self.number("Q"))
        else:
            raise broken(self.path, f"its metadata has a long array of the type {kind}")
        return None

    def _skip(self, count: int) -> None:
        self._need(count)
        self.file.seek(count, os.SEEK_CUR)

    def _need(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise broken(self.path, "it ends inside its header (a truncated copy?)")


def _description(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, dimensions = cursor.text(), cursor.number("I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise broken(cursor.path, f"its tensor '{short(name)}' has {dimensions} dimensions")
    sizes = [cursor.number("Q") for _ in range(dimensions)]
    if 0 in sizes:
        raise broken(cursor.path, f"its tensor '{short(name)}' has the shape {sizes[::-1]}, which is empty")
    return name, tuple(reversed(sizes)), cursor.number("I"), cursor.number("Q")


def _placed(
    path: Path, described: list[tuple[str, tuple[int, ...], int, int]], begin: int, size: int
) -> list[Stored]:
    tensors: dict[str, Stored] = {}
    end = begin
    for name, shape, kind, offset in sorted(described, key=lambda d: d[3]):
        if name in tensors:
            raise broken(path, f"it holds the tensor '{short(name)}' twice")
        if kind not in gguf.GGML_QUANT_SIZES:
            raise broken(path, f"its tensor '{short(name)}' has the unknown type {kind}")
        form = gguf.GGMLQuantizationType(kind)
        block_values, block_bytes = gguf.GGML_QUANT_SIZES[form]
        if shape[-1] % block_values:
            raise broken(
                path, f"its tensor '{short(name)}' of {shape} is no whole number of {form.name} blocks"
            )
        nbytes = math.prod(shape) // block_values * block_bytes
        if begin + offset < end:
            raise broken(path, f"its tensor '{short(name)}' overlaps the one before it")
        end = begin + offset + nbytes
        if end > size:
            raise broken(path, f"it ends inside the tensor '{short(name)}' (a truncated copy?)")
        tensors[name] = Stored(name, form, shape, begin + offset, nbytes)
    return list(tensors.values())

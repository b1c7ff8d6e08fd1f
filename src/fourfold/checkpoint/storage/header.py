"""The header of a safetensors file: strict to read, canonical to write.

A file is an unsigned little-endian 64-bit header length, a JSON header padded with spaces to a multiple of 8
bytes, and the tensors' bytes. Header entries are ``name: {dtype, shape, data_offsets: [begin, end]}`` with
offsets counted from the end of the header; together they must cover the rest of the file without gap or
overlap. Source: the format's description in the safetensors repository (README, "Format"), and its limits
(100 MB of header). Strictness costs a sort of the entries; it buys that no reader can be led outside the
file.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fourfold.core.errors import FourfoldError

MAX_HEADER_BYTES = 100_000_000
METADATA_KEY = "__metadata__"
ALIGNMENT_BYTES = 8

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
CODES: dict[torch.dtype, str] = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: where its bytes are. ``begin`` counts from the start of the file, in bytes."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    nbytes: int


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that is going to be written: its name, dtype and shape are all that a header needs."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor's bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, StoredTensor]:
    """All tensors of ``path`` in the order of their bytes. Raises FourfoldError for any defect."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = _header_length(path, prefix, size)
            text = file.read(length)
    except OSError as error:
        raise FourfoldError(
            f"Cannot read {path}: {error.strerror}. Check the file and its rights."
        ) from error
    if len(text) != length:
        raise broken(path, f"its header ends after {len(text)} of {length} bytes")
    entries = parse_object(path, text, "header")
    _check_metadata(path, entries.pop(METADATA_KEY, None))
    tensors = [_entry(path, name, entry, 8 + length) for name, entry in entries.items()]
    tensors.sort(key=lambda t: (t.begin, t.nbytes, t.name))
    _check_coverage(path, tensors, 8 + length, size)
    return {tensor.name: tensor for tensor in tensors}


def build_header(tensors: list[PlannedTensor], metadata: Mapping[str, str]) -> bytes:
    """The length prefix and header for ``tensors`` laid out in the given order."""
    entries: dict[str, Any] = {METADATA_KEY: dict(metadata)} if metadata else {}
    begin = 0
    for tensor in tensors:
        end = begin + tensor.nbytes
        code = CODES[tensor.dtype]
        entries[tensor.name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def parse_object(path: Path, text: bytes, part: str) -> dict[str, Any]:
    """A JSON object without duplicate keys. Raises FourfoldError that names ``path`` and ``part``."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        if b"\\ud" in text or b"\\uD" in text:
            # JSON can escape half a character, which could never be written again
            json.dumps(value, ensure_ascii=False).encode()
    except _DuplicateKeyError as error:
        raise broken(path, f"its {part} holds the key '{short(error.key)}' twice") from None
    except (ValueError, RecursionError) as error:
        raise broken(path, f"its {part} is not valid JSON ({short(str(error))})") from None
    if not isinstance(value, dict):
        raise broken(path, f"its {part} is not a JSON object")
    return value


def broken(path: Path, defect: str) -> FourfoldError:
    """The error for a damaged file: place, defect, remedy."""
    return FourfoldError(f"{path} is damaged: {defect}. Fetch or write this file again; nothing was changed.")


def short(text: str) -> str:
    """``text`` cut so that a hostile name cannot fill the screen, with control characters escaped."""
    cut = text if len(text) <= 120 else text[:120] + "…"
    return cut.encode("unicode_escape").decode() if not cut.isprintable() else cut


class _DuplicateKeyError(Exception):
    def __init__(self, key: str):
        self.key = key


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateKeyError(key)
        result[key] = value
    return result


def _header_length(path: Path, prefix: bytes, size: int) -> int:
    if len(prefix) < 8:
        raise broken(path, f"it has {size} bytes, fewer than the 8 of a safetensors length prefix")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise broken(path, f"it claims a header of {length} bytes, more than the limit of {MAX_HEADER_BYTES}")
    if 8 + length > size:
        raise broken(path, f"it claims a header of {length} bytes, but has only {size} bytes in all")
    return length


def _check_metadata(path: Path, metadata: object) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise broken(path, f"its {METADATA_KEY} is not a map of texts")


def _entry(path: Path, name: str, entry: object, data_start: int) -> StoredTensor:
    label = f"tensor '{short(name)}'"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise broken(path, f"{label} lacks exactly the keys dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise broken(path, f"{label} has the unknown dtype {short(repr(entry['dtype']))}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _is_sizes(shape):
        raise broken(path, f"{label} has the shape {short(repr(shape))}, not a list of sizes")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise broken(path, f"{label} has the data_offsets {short(repr(offsets))}, not a [begin, end]")
    begin, end = offsets
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise broken(
            path,
            f"{label} of {entry['dtype']} {shape} cannot fill the {end - begin} bytes of its data_offsets",
        )
    return StoredTensor(path, name, dtype, tuple(shape), data_start + begin, end - begin)


def _is_sizes(value: object) -> bool:
    # bool is an int in Python, and sizes beyond 2^63 would overflow in torch
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**62 for v in value)


def _check_coverage(path: Path, tensors: list[StoredTensor], data_start: int, size: int) -> None:
    position = data_start
    for tensor in tensors:
        if tensor.begin < position:
            raise broken(path, f"tensor '{short(tensor.name)}' overlaps the one before it")
        if tensor.begin > position:
            raise broken(path, f"there are bytes of no tensor before '{short(tensor.name)}'")
        position += tensor.nbytes
    if position > size:
        raise broken(path, f"it ends {position - size} bytes too early (a truncated copy?)")
    if position < size:
        raise broken(path, f"{size - position} bytes after its last tensor belong to no tensor")

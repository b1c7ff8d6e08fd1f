"""Our reader and writer of safetensors against the library, and against every kind of damage."""

import json
import os
import random
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fourfold.checkpoint.storage.header import DTYPES, PlannedTensor, read_header
from fourfold.checkpoint.storage.reader import map_tensor, read_tensor
from fourfold.checkpoint.storage.writer import SafetensorsWriter
from fourfold.core.errors import FourfoldError

# F8_E8M0 is left out where values are made: torch makes none at random, its bytes are U8's
MADE = [d for d in DTYPES.values() if d is not torch.float8_e8m0fnu]


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {f"a.{i}.{dtype}": torch.randint(0, 2, (3, 5)).to(dtype) for i, dtype in enumerate(MADE)}
    tensors |= {"empty": torch.empty(0, 4), "scalar": torch.tensor(2.5), "odd bytes": torch.ones(7).bool()}
    return tensors | {'ünïcode "quoted"': torch.arange(6).reshape(2, 3), "scale": some_scales()}


def some_scales() -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8).view(torch.float8_e8m0fnu)


def write(path: Path, tensors: dict[str, torch.Tensor], names: list[str]) -> str:
    digests: list[str] = []
    plan = [PlannedTensor(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()]
    with SafetensorsWriter(path, plan, digests.append) as writer:
        for name in names:
            writer.write(name, tensors[name])
    return digests[0]


def test_our_file_is_byte_for_byte_the_librarys(tmp_path):
    tensors = some_tensors()
    names = list(tensors)
    random.Random(1).shuffle(names)
    write(tmp_path / "ours.safetensors", tensors, names)
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_the_library_reads_ours_and_we_read_theirs(tmp_path):
    tensors = some_tensors()
    write(tmp_path / "ours.safetensors", tensors, list(tensors))
    with safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert set(file.keys()) == set(tensors)
        assert file.metadata() == {"format": "pt"}
    read = {name: read_tensor(stored) for name, stored in read_header(tmp_path / "ours.safetensors").items()}
    for name, expected in load_file(tmp_path / "ours.safetensors").items():
        assert read[name].dtype == expected.dtype and read[name].shape == expected.shape
        assert torch.equal(read[name].reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def test_a_mapped_tensor_is_the_one_in_the_file(tmp_path):
    path = tmp_path / "ours.safetensors"
    big = {f"big.{dtype}": torch.randint(0, 2, (300, 500)).to(dtype) for dtype in MADE}
    tensors = some_tensors() | big | {"odd": torch.ones(100_001).bool(), "after": torch.randn(200_000)}
    write(path, tensors, list(tensors))
    before = path.read_bytes()
    for name, stored in read_header(path).items():
        mapped = map_tensor(stored)
        expected = tensors[name].reshape(-1).view(torch.uint8)
        assert (mapped.dtype, tuple(mapped.shape)) == (stored.dtype, stored.shape)
        assert torch.equal(mapped.reshape(-1).view(torch.uint8), expected)
        mapped.zero_()
    assert path.read_bytes() == before, "what is written to it stays in memory"


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files in /proc")
def test_a_mapped_tensor_holds_no_copy(tmp_path):
    path = tmp_path / "t.safetensors"
    save_file({"t": torch.zeros(1 << 20, dtype=torch.uint8)}, path)
    stored = read_header(path)["t"]
    before = open_files()
    mapped, read = map_tensor(stored), read_tensor(stored)
    with path.open("r+b") as file:
        file.seek(stored.begin + (1 << 19))
        file.write(b"\7")
    assert mapped[1 << 19] == 7 and read[1 << 19] == 0
    assert open_files() == before, "a large model has more tensors than there may be files"
    os.truncate(path, stored.begin + 5)
    with pytest.raises(FourfoldError, match="ends inside the tensor 't'"):
        map_tensor(stored)


def test_a_written_tensor_must_be_the_planned_one(tmp_path):
    plan = [PlannedTensor("a", torch.float32, (2,))]
    path = tmp_path / "x.safetensors"
    with pytest.raises(FourfoldError, match="was planned"), SafetensorsWriter(path, plan, print) as writer:
        writer.write("a", torch.ones(3))
    with pytest.raises(FourfoldError, match="not planned"), SafetensorsWriter(path, plan, print) as writer:
        writer.write("b", torch.ones(2))
    with pytest.raises(FourfoldError, match="lacks planned tensors: a"), SafetensorsWriter(path, plan, print):
        pass
    assert list(tmp_path.iterdir()) == []


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, dtype: str = "U8", shape: list | None = None) -> dict:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


BROKEN = {
    "empty": (b"", "fewer than the 8"),
    "short prefix": (b"\x10\x00", "fewer than the 8"),
    "absurd header length": (raw({}, length=2**63), "more than the limit"),
    "header past the end": (raw({}, length=1000), "has only"),
    "not JSON": (raw(b"{'a': 1}"), "not valid JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not valid JSON"),
    "deep JSON": (raw(b"[" * 100_000), "not valid JSON"),
    "not an object": (raw([1, 2]), "not a JSON object"),
    "duplicate key": (raw(b'{"a":' + json.dumps(entry(0, 1)).encode() + b',"a":1}', b"x"), "'a' twice"),
    "duplicate inner key": (raw(b'{"a":{"dtype":"U8","dtype":"U8"}}'), "'dtype' twice"),
    "overlap": (raw({"a": entry(0, 4), "b": entry(2, 6)}, b"x" * 6), "overlaps"),
    "gap": (raw({"a": entry(0, 2), "b": entry(4, 6)}, b"x" * 6), "bytes of no tensor"),
    "gap at the start": (raw({"a": entry(2, 4)}, b"x" * 4), "bytes of no tensor"),
    "truncated": (raw({"a": entry(0, 8)}, b"x" * 5), "3 bytes too early"),
    "bytes left over": (raw({"a": entry(0, 2)}, b"x" * 5), "belong to no tensor"),
    "unknown dtype": (raw({"a": entry(0, 2, "F7")}, b"x" * 2), "unknown dtype 'F7'"),
    "dtype no text": (raw({"a": entry(0, 2) | {"dtype": 7}}, b"x" * 2), "unknown dtype 7"),
    "shape too large": (raw({"a": entry(0, 2, "U8", [3])}, b"x" * 2), "cannot fill"),
    "shape negative": (raw({"a": entry(0, 2, "U8", [-1, -2])}, b"x" * 2), "not a list of sizes"),
    "shape overflows": (raw({"a": entry(0, 0, "U8", [2**63, 2**63, 0])}), "not a list of sizes"),
    "shape is a truth": (raw({"a": entry(0, 1, "U8", [True])}, b"x"), "not a list of sizes"),
    "offsets reversed": (raw({"a": entry(0, 2) | {"data_offsets": [2, 0]}}, b"x" * 2), "data_offsets"),
    "offsets of three": (raw({"a": entry(0, 2) | {"data_offsets": [0, 1, 2]}}, b"x" * 2), "data_offsets"),
    "key missing": (raw({"a": {"dtype": "U8", "shape": [1]}}, b"x"), "lacks exactly the keys"),
    "key too many": (raw({"a": entry(0, 1) | {"more": 1}}, b"x"), "lacks exactly the keys"),
    "half a character": (raw(b'{"a\\ud800b":' + json.dumps(entry(0, 1)).encode() + b"}", b"x"), "surrogates"),
    "metadata no texts": (raw({"__metadata__": {"a": 1}}), "not a map of texts"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_each_defect_has_one_clear_error(tmp_path, case):
    content, expected = BROKEN[case]
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(FourfoldError) as caught:
        read_header(path)
    message = str(caught.value)
    assert expected in message and str(path) in message and "again" in message and "\n" not in message


def mutated(good: bytes, seed: int) -> bytes:
    """A few random edits: bytes set, cut, doubled, or a number in the header changed."""
    source = random.Random(seed)
    data = bytearray(good)
    for _ in range(source.randint(1, 4)):
        place = source.randrange(len(data))
        match source.randrange(5):
            case 0:
                data[place] = source.randrange(256)
            case 1:
                del data[place : place + source.randint(1, 40)]
            case 2:
                data[place:place] = data[place : place + source.randint(1, 40)]
            case 3:
                digits = [i for i, b in enumerate(data[:400]) if chr(b).isdigit()]
                data[source.choice(digits or [0])] = ord(source.choice('0123456789-.e"[{'))
            case _:
                data[:8] = struct.pack(
                    "<Q", source.choice([0, 1, 2**31, 2**64 - 1, len(data), len(data) - 8])
                )
        if not data:
            return bytes(data)
    return bytes(data)


def test_mutations_never_give_anything_but_our_error(tmp_path):
    tensors = {"layer.weight": torch.ones(4, 8), "layer.scale": torch.ones(4, dtype=torch.uint8)}
    path = tmp_path / "fuzzed.safetensors"
    write(path, tensors, list(tensors))
    good = path.read_bytes()
    refused = 0
    for seed in range(1200):
        path.write_bytes(mutated(good, seed))
        try:
            for stored in read_header(path).values():
                read_tensor(stored)
        except FourfoldError:
            refused += 1
    assert 600 < refused < 1200  # most mutations hit the header, some only change a number

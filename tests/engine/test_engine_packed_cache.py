"""The packed cache: what is put is got again, and what is stale, cut short or damaged counts as none."""

import os
import shutil

import pytest
import torch

from fourfold.checkpoint import open_checkpoint
from fourfold.engine import packed_cache
from fourfold.engine.packed_cache import FOLDER, PackedCache
from fourfold.formats import get_format
from fourfold.kernels import native_available
from fourfold.kernels.cpu.packed import PackedWeight

pytestmark = pytest.mark.skipif(not native_available(), reason="the C++ extension is not built")


@pytest.fixture
def checkpoint(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return open_checkpoint(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def weights() -> dict[str, PackedWeight]:
    dense = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    formats = {name: get_format(name).quantize(dense) for name in ("mxfp4", "mxint8")}
    return {name: PackedWeight.pack(w) for name, w in (formats | {"kept": dense}).items()}


def written(checkpoint, weights):
    cache = PackedCache.open(checkpoint)
    for name, weight in weights.items():
        assert cache.get(name) is None
        cache.put(name, weight)
    return cache.finish()


def assert_holds(checkpoint, weights):
    cache = PackedCache.open(checkpoint)
    assert len(cache) == len(weights)
    for name, weight in weights.items():
        got = cache.get(name)
        assert got is not None and (got.kind, got.n, got.k) == (weight.kind, weight.n, weight.k)
        assert torch.equal(got.data, weight.data) and got.data.data_ptr() % 64 == 0
    assert cache.finish() is None, "nothing was new"


def test_what_is_put_is_got_in_the_next_run(checkpoint, weights):
    place = written(checkpoint, weights)
    assert place is not None and place.parent == checkpoint.folder / FOLDER
    assert_holds(checkpoint, weights)
    assert [file.name for file in place.parent.iterdir()] == [place.name]


def test_a_new_weight_is_written_beside_the_old(checkpoint, weights):
    written(checkpoint, weights)
    cache = PackedCache.open(checkpoint)
    cache.put("new", weights["kept"])
    assert cache.finish() is not None
    assert_holds(checkpoint, weights | {"new": weights["kept"]})


def test_a_folder_that_cannot_be_written_is_replaced_by_the_users(checkpoint, weights, monkeypatch, tmp_path):
    (checkpoint.folder / FOLDER).write_text("a file is in the way")
    place = written(checkpoint, weights)
    assert place is not None and place.is_relative_to(tmp_path / "user")
    assert_holds(checkpoint, weights)


def test_without_a_place_to_write_nothing_happens(checkpoint, weights, tmp_path):
    (checkpoint.folder / FOLDER).write_text("a file is in the way")
    (tmp_path / "user").write_text("here too")
    assert written(checkpoint, weights) is None
    assert len(PackedCache.open(checkpoint)) == 0


def test_a_gguf_file_has_its_own_cache(tmp_path, weights, monkeypatch, checkpoint):
    class File:  # all that the cache looks at
        folder, source = None, str(tmp_path / "small.gguf")

    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    place = written(File, weights)
    assert place is not None and place.name.startswith("small-layout-")
    assert_holds(File, weights)


def test_a_changed_checkpoint_makes_it_stale(checkpoint, weights):
    written(checkpoint, weights)
    shard = next(checkpoint.folder.glob("*.safetensors"))
    status = shard.stat()
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert len(PackedCache.open(checkpoint)) == 0
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert_holds(checkpoint, weights)
    (checkpoint.folder / "config.json").write_text("{}")
    assert len(PackedCache.open(checkpoint)) == 0


def test_another_layout_is_another_file(checkpoint, weights, monkeypatch):
    written(checkpoint, weights)
    monkeypatch.setattr(packed_cache, "layout_version", lambda: 99)
    assert len(PackedCache.open(checkpoint)) == 0


def test_damage_anywhere_is_seen(checkpoint, weights):
    place = written(checkpoint, weights)
    whole = place.read_bytes()
    header = packed_cache.PREFIX + int.from_bytes(whole[16:24], "little")
    tiles = range(4096, len(whole), 4096)
    for where in (0, 20, 30, 60, header - 1, *tiles, 4096 + weights["mxfp4"].data.nbytes - 1):
        place.write_bytes(whole[:where] + bytes([whole[where] ^ 4]) + whole[where + 1 :])
        assert len(PackedCache.open(checkpoint)) == 0, where
    for length in (0, 10, 60, header, 4096, len(whole) - 4096):
        place.write_bytes(whole[:length])
        assert len(PackedCache.open(checkpoint)) == 0, length
    place.write_bytes(whole)
    assert_holds(checkpoint, weights)

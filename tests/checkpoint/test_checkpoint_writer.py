"""The writer: killed anywhere and resumed it gives the same bytes; what it cannot do it refuses, clearly."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import projections, quantize_folder

from fourfold.checkpoint import CheckpointWriter, TensorInfo, open_checkpoint
from fourfold.checkpoint.journal import LOCK
from fourfold.checkpoint.writer import partial_folder
from fourfold.core.errors import FourfoldError, UsageError
from fourfold.core.quantization import Quantization

SHARD_BYTES = 12_000


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def make(source: Path, out: Path, **options) -> Path:
    options = {"max_shard_bytes": SHARD_BYTES, "kv_cache": "fp8"} | options
    return quantize_folder(source, out, "compressed-tensors", projections(), **options)


@pytest.fixture(scope="module")
def whole(tiny_llama, tmp_path_factory) -> Path:
    """Written without an interruption, in many shards."""
    return make(tiny_llama, tmp_path_factory.mktemp("whole") / "model")


def test_the_folder_is_complete(whole, tiny_llama):
    checkpoint = open_checkpoint(whole)
    assert len(list(whole.glob("*.safetensors"))) > 4
    assert checkpoint.manifest is not None
    assert set(checkpoint.manifest.sha256) == {p.name for p in whole.iterdir()} - {"fourfold.json"}
    assert set(checkpoint.names()) == set(open_checkpoint(tiny_llama).names())
    assert not partial_folder(whole).exists()
    assert (whole / "tokenizer.json").read_bytes() == (tiny_llama / "tokenizer.json").read_bytes()


def test_a_stop_at_any_shard_boundary_changes_no_byte(whole, tiny_llama, tmp_path):
    shards = len(list(whole.glob("*.safetensors")))
    for stop in range(shards):
        out = tmp_path / f"stopped-{stop}" / "model"
        out.parent.mkdir()
        make(tiny_llama, out, stop_after=stop)
        assert not out.exists() and partial_folder(out).is_dir()
        make(tiny_llama, out, resume=True)
        assert contents(out) == contents(whole)


KILLED = """
import os, signal, sys
from pathlib import Path
from fourfold.checkpoint.convert import convert
seen = []
def progress(name, nbytes):
    seen.append(name)
    if len(seen) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
convert(sys.argv[1], Path(sys.argv[2]), "quark", max_shard_bytes=12_000, progress=progress)
"""


def test_a_kill_inside_a_shard_can_be_resumed(whole, tmp_path):
    from fourfold.checkpoint.convert import convert

    convert(whole, tmp_path / "whole", "quark", max_shard_bytes=SHARD_BYTES)
    out = tmp_path / "killed"
    done = subprocess.run([sys.executable, "-c", KILLED, str(whole), str(out)], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    left = partial_folder(out)
    assert list(left.glob("*.safetensors")) and list(left.glob("*.safetensors.tmp"))
    convert(whole, out, "quark", max_shard_bytes=SHARD_BYTES, resume=True)
    mine, theirs = contents(out), contents(tmp_path / "whole")
    # the card carries the folder's name
    assert mine.pop("fourfold.json") == theirs.pop("fourfold.json").replace(b'"whole"', b'"killed"')
    assert mine == theirs


def test_a_damaged_finished_shard_is_written_again(whole, tiny_llama, tmp_path):
    out = tmp_path / "model"
    make(tiny_llama, out, stop_after=3)
    shard = sorted(partial_folder(out).glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    make(tiny_llama, out, resume=True)
    assert contents(out) == contents(whole)


def test_a_kill_before_the_last_rename_can_be_resumed(whole, tiny_llama, tmp_path):
    out = tmp_path / "model"
    make(tiny_llama, out)
    out.rename(partial_folder(out))
    make(tiny_llama, out, resume=True)
    assert contents(out) == contents(whole)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"fingerprint": {"source": "another"}}, "another source: the tiny model then, another now"),
        ({"fingerprint": {"source": "the tiny model", "recipe": "x"}}, "another recipe: None then, x now"),
        ({"max_shard_bytes": 50_000}, "another layout"),
        ({"kv_cache": None}, "another layout"),
    ],
)
def test_resuming_another_work_is_refused(tiny_llama, tmp_path, change, field):
    make(tiny_llama, tmp_path / "model", stop_after=1)
    with pytest.raises(UsageError, match=field):
        make(tiny_llama, tmp_path / "model", resume=True, **change)


def test_an_existing_output_is_refused(whole, tiny_llama):
    with pytest.raises(UsageError, match="exists already"):
        make(tiny_llama, whole, resume=True)


def test_interrupted_work_is_not_overwritten_without_resume(tiny_llama, tmp_path):
    make(tiny_llama, tmp_path / "model", stop_after=1)
    with pytest.raises(UsageError, match="--resume, or delete"):
        make(tiny_llama, tmp_path / "model")


def test_a_damaged_journal_is_refused(tiny_llama, tmp_path):
    make(tiny_llama, tmp_path / "model", stop_after=1)
    (partial_folder(tmp_path / "model") / "journal.json").write_text("{}")
    with pytest.raises(FourfoldError, match="damaged"):
        make(tiny_llama, tmp_path / "model", resume=True)


def test_a_full_disk_leaves_work_that_can_be_resumed(whole, tiny_llama, tmp_path):
    out = tmp_path / "model"
    largest = max(path.stat().st_size for path in whole.glob("*.safetensors"))
    with files_of_at_most(largest - 1), pytest.raises(FourfoldError, match=r"No room for .*--resume"):
        make(tiny_llama, out)
    assert not out.exists() and not list(partial_folder(out).glob("*.safetensors.tmp"))
    make(tiny_llama, out, resume=True)
    assert contents(out) == contents(whole)


@contextmanager
def files_of_at_most(nbytes: int):
    """A limit on the size of files fails as a full disk does, in the same calls."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_at_a_small_file(tiny_llama, tmp_path):
    long, limit = "x" * 60_000, 40_000
    source = Path(shutil.copytree(tiny_llama, tmp_path / "source"))
    (source / "chat_template.jinja").write_text(long)
    with files_of_at_most(limit), pytest.raises(FourfoldError, match=r"No room for .*partial.*--resume"):
        make(source, tmp_path / "tokenizer")
    make(source, tmp_path / "tokenizer", resume=True)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"long": long}))
    with (
        files_of_at_most(limit),
        pytest.raises(FourfoldError, match=r"No room for .*config\.json: .*--resume"),
    ):
        make(source, tmp_path / "config")
    make(source, tmp_path / "config", resume=True)
    assert contents(tmp_path / "config")["chat_template.jinja"] == long.encode()
    fingerprint = {"source": long}
    with files_of_at_most(limit), pytest.raises(FourfoldError, match=r"No room for .*journal\.json"):
        make(source, tmp_path / "journal", fingerprint=fingerprint)
    make(source, tmp_path / "journal", resume=True, fingerprint=fingerprint)
    assert list(contents(tmp_path / "journal")) == list(contents(tmp_path / "config"))


def test_an_output_where_none_can_be(tiny_llama, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FourfoldError, match=r"file/out\.partial cannot be used: Not a directory"):
        make(tiny_llama, tmp_path / "file" / "out")
    with pytest.raises(FourfoldError, match="cannot be used: File name too long"):
        make(tiny_llama, tmp_path / ("o" * 300))


def test_every_file_is_synced_before_the_folder_gets_its_name(tiny_llama, tmp_path, monkeypatch):
    synced, real = set(), os.fsync

    def fsync(handle: int) -> None:
        # while OUT is not there, what is synced is in OUT.partial
        if not (tmp_path / "model").exists():
            synced.add(Path(f"/proc/self/fd/{handle}").readlink().name.removesuffix(".tmp"))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    make(tiny_llama, tmp_path / "model")
    assert synced >= set(contents(tmp_path / "model"))


LOCKING = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


def test_two_processes_cannot_write_into_one_folder(tmp_path):
    """The other process does what a second Fourfold does first, without loading torch."""
    info = TensorInfo("a", (2,), torch.float32, None, 8)
    work = partial_folder(tmp_path / "out")
    work.mkdir()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}

    def write() -> CheckpointWriter:
        return CheckpointWriter(
            tmp_path / "out", "plain", {}, Quantization(), [info], fingerprint={}, resume=True
        )

    with subprocess.Popen([sys.executable, "-c", LOCKING, str(work / LOCK)], text=True, **pipes) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(FourfoldError, match="Another process is writing"):
            write()
        other.communicate("")
    assert len(write().pending()) == 1


def test_what_was_not_planned_is_refused(tmp_path):
    info = TensorInfo("a", (2,), torch.float32, None, 8)
    writer = CheckpointWriter(tmp_path / "out", "plain", {}, Quantization(), [info], fingerprint={})
    with pytest.raises(FourfoldError, match="was planned as"), writer.shard(0) as file:
        file.write("a", torch.ones(3))
    with pytest.raises(FourfoldError, match="not planned"), writer.shard(0) as file:
        file.write("b", torch.ones(2))
    with pytest.raises(FourfoldError, match="still lacks 1 shards"):
        writer.finish(source="x")


def test_a_read_only_dialect_is_refused(tmp_path):
    with pytest.raises(UsageError, match="read only"):
        CheckpointWriter(tmp_path / "out", "mxfp4", {}, Quantization(), [], fingerprint={})
    with pytest.raises(UsageError, match=r"Unknown dialect 'gptq'.*quark"):
        CheckpointWriter(tmp_path / "out", "gptq", {}, Quantization(), [], fingerprint={})

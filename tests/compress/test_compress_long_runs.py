"""Calibrated runs that are killed, run out of disk or memory, or meet bad weights: clear, nothing lost."""

import hashlib
import json
import resource
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from compress_models import change_tensor
from tiny_models import build_tiny_model

from fourfold.compress import Recipe, quantize
from fourfold.compress.calibrated.skeleton import Skeleton
from fourfold.compress.calibrated.work import LayerWork
from fourfold.compress.calibration import CalibrationSet
from fourfold.core.errors import FourfoldError, UsageError

RECIPE = {"name": "own", "rules": [{"weight": "mxfp4"}], "passes": ["gptq"]}
GPTQ = Recipe.model_validate(RECIPE)
TOKENS = torch.arange(8 * 32).view(8, 32) * 7 % 256


def run(source, out, tokens=TOKENS, recipe=GPTQ, **options):
    return quantize(source, out, recipe, calibration=CalibrationSet(tokens, "counted", 0), **options)


def contents(folder):
    """Hashes of all files; those of two runs agree only when both folders have the same name."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


HELPER = '''
import json, os, shutil, signal, sys
from pathlib import Path
import torch
from fourfold.compress import Recipe, quantize
from fourfold.compress.calibration import SelfWritten

source, place, shard_bytes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
recipe = Recipe.model_validate(json.loads(sys.argv[4]))

def write(first, count):
    return (torch.arange(first, first + count)[:, None] * 7 + torch.arange(16)) % 256

def make(out, resume=False):
    quantize(source, out, recipe, calibration=SelfWritten(8, 16, 0, write), resume=resume,
             max_shard_bytes=shard_bytes)

def fork(out, kill_at=None, resume=False):
    """Fork, quantize, and give the child's exit: 0, or minus the signal."""
    pid = os.fork()
    if pid == 0:
        seen = 0
        def hook(event, arguments):
            nonlocal seen
            if event in ("os.rename", "os.remove", "os.rmdir"):
                seen += 1
                if seen == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        code = 1
        try:
            make(out, resume)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def digest(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}

torch.set_num_threads(1)
(place / "whole").mkdir()
make(place / "whole" / "out")
whole = digest(place / "whole" / "out")
results, kill_at = [], 1
while True:
    folder = place / str(kill_at)
    folder.mkdir()
    killed = fork(folder / "out", kill_at)
    if killed == 0:
        break
    work = folder / "out.partial"
    layers, shards = len(list(work.glob("layers/layer*.json"))), len(list(work.glob("*.safetensors")))
    resumed = fork(folder / "out", resume=True)
    found = digest(folder / "out") if resumed == 0 else {}
    differing = sorted(n for n in whole.keys() | found.keys() if whole.get(n) != found.get(n))
    results.append({"killed": killed, "layers": layers, "shards": shards, "resumed": resumed,
                    "differing": differing})
    shutil.rmtree(folder)
    kill_at += 3
print(json.dumps(results))
'''
SHARD_BYTES = 60_000


def test_killed_anywhere_and_resumed_gives_the_same_bytes(tiny_llama, tmp_path):
    words = [str(tiny_llama), str(tmp_path), str(SHARD_BYTES), json.dumps(RECIPE)]
    done = subprocess.run([sys.executable, "-c", HELPER, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert {r["killed"] for r in results} == {-9}
    assert [r for r in results if r["resumed"] != 0 or r["differing"]] == []
    # before the first layer, between layers, after the last; and with no, some and all shards
    assert {r["layers"] for r in results} == {0, 1, 2}, results
    assert len({r["shards"] for r in results}) >= 3, results


class StoppedError(Exception):
    pass


def stop_after(layer):
    def progress(done, total, name):
        if done == layer:
            raise StoppedError

    return progress


def test_a_resume_with_something_else_names_the_field(tiny_llama, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(StoppedError):
        run(tiny_llama, out, layer_progress=stop_after(1))
    damped = Recipe.model_validate(RECIPE | {"passes": [{"gptq": {"damping": 0.02}}]})
    for field, change in (
        ("recipe", {"recipe": damped}),
        ("calibration_sha256", {"tokens": TOKENS.flip(0)}),
        ("calibration_samples", {"tokens": TOKENS[:4]}),
        ("dialect", {"dialect": "quark"}),
    ):
        with pytest.raises(UsageError, match=f"was started with another {field}: "):
            run(tiny_llama, out, resume=True, **change)
    monkeypatch.setattr(torch, "__version__", "1.0")
    with pytest.raises(UsageError, match=r"another torch: \S+ then, 1.0 now"):
        run(tiny_llama, out, resume=True)
    monkeypatch.undo()
    run(tiny_llama, out, resume=True)


def test_a_finished_layer_that_was_damaged_is_made_again(tiny_llama, tmp_path):
    (tmp_path / "whole").mkdir()
    run(tiny_llama, tmp_path / "whole" / "out")
    out = tmp_path / "out"
    with pytest.raises(StoppedError):
        run(tiny_llama, out, layer_progress=stop_after(2))
    layer = tmp_path / "out.partial" / "layers" / "layer-00000.safetensors"
    content = bytearray(layer.read_bytes())
    content[-1] ^= 1
    layer.write_bytes(content)
    run(tiny_llama, out, resume=True)
    assert contents(out) == contents(tmp_path / "whole" / "out")


@contextmanager
def files_of_at_most(nbytes):
    """A limit on the size of files fails as a full disk does, in the same calls."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_under_a_layer(tiny_llama, tmp_path):
    (tmp_path / "whole").mkdir()
    run(tiny_llama, tmp_path / "whole" / "out")
    out = tmp_path / "out"
    with pytest.raises(StoppedError):
        run(tiny_llama, out, layer_progress=stop_after(1))
    with files_of_at_most(10_000), pytest.raises(FourfoldError, match=r"No room for .*layer-00001.*--resume"):
        run(tiny_llama, out, resume=True)
    assert sorted(p.stem for p in (tmp_path / "out.partial" / "layers").iterdir()) == ["layer-00000"] * 2
    run(tiny_llama, out, resume=True)
    assert contents(out) == contents(tmp_path / "whole" / "out")


@pytest.mark.parametrize("keep", [[], ["model.layers.1.*"]])
@pytest.mark.parametrize("name", ["mlp.up_proj.weight", "input_layernorm.weight"])
def test_a_weight_that_is_not_finite_is_named_and_the_layers_before_it_are_kept(tmp_path, name, keep):
    """A `keep` entry does not help a run that computes with it."""
    source, full = build_tiny_model(tmp_path / "source"), f"model.layers.1.{name}"

    def spoil(tensor):
        tensor.view(-1)[7] = float("nan")
        return tensor

    change_tensor(source, full, spoil)
    recipe = GPTQ.model_copy(update={"keep": keep})
    with pytest.raises(FourfoldError, match=f"{full} holds NaN or Inf"):
        run(source, tmp_path / "out", recipe=recipe)
    assert (tmp_path / "out.partial" / "layers" / "layer-00000.json").is_file()


def limited(monkeypatch, sequences, layer=1):
    """Layer ``layer`` has memory for so many sequences at a time, as a GPU would that is nearly full."""
    forward, sizes = LayerWork.forward, []

    def strict(self, hidden):
        sizes.append(len(hidden))
        if self.index == layer and len(hidden) > sequences:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, hidden)

    monkeypatch.setattr(LayerWork, "forward", strict)
    return sizes


def test_memory_that_ends_is_met_with_smaller_batches(tiny_llama, tmp_path, monkeypatch):
    sizes = limited(monkeypatch, sequences=3)
    manifest = run(tiny_llama, tmp_path / "out")
    assert manifest.card.weight_format == "mxfp4"
    assert sizes[0] == 8 and sizes[-1] == 2 and 4 in sizes


def test_memory_for_not_even_one_sequence_is_told(tiny_llama, tmp_path, monkeypatch):
    limited(monkeypatch, sequences=0)
    with pytest.raises(FourfoldError, match=r"model\.layers\.1 does not fit .*--resume.*--sequence-tokens"):
        run(tiny_llama, tmp_path / "out")
    monkeypatch.undo()
    run(tiny_llama, tmp_path / "out", resume=True)


def test_memory_that_ends_before_the_first_layer_is_told(tiny_llama, tmp_path, monkeypatch):
    def full(self, batches):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(Skeleton, "enter", full)
    with pytest.raises(FourfoldError, match=r"beside the layers .*does not fit .*--resume.*--samples\.$"):
        run(tiny_llama, tmp_path / "out")
    monkeypatch.undo()
    run(tiny_llama, tmp_path / "out", resume=True)


def test_a_resume_counts_what_it_does_itself(tiny_llama, tmp_path):
    """What was finished before goes by in a moment, and would make the time left too short."""
    with pytest.raises(StoppedError):
        run(tiny_llama, tmp_path / "out", layer_progress=stop_after(1))
    told = []
    run(tiny_llama, tmp_path / "out", resume=True, layer_progress=lambda *of: told.append(of))
    assert told == [(1, 2, "model.layers.1")] * 2 + [(2, 2, "model.layers.1")]


def test_a_kill_after_the_last_rename_loses_nothing(tiny_llama, tmp_path):
    """The command may be repeated until it succeeds, whenever it was killed; another command is refused."""
    out = tmp_path / "out"
    manifest = run(tiny_llama, out)
    before = contents(out)
    assert run(tiny_llama, out, resume=True) == manifest
    assert contents(out) == before and not list(tmp_path.glob("*.partial"))
    for other in ({}, {"resume": True, "tokens": TOKENS[:4]}, {"resume": True, "dialect": "quark"}):
        with pytest.raises(UsageError, match="exists already"):
            run(tiny_llama, out, **other)

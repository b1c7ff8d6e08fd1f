"""Killed at every step that makes something durable, then resumed: the same bytes as a run that was not
killed.

One helper process imports torch once and forks for each run, so that thirty runs cost what thirty runs cost.
The kill comes from an audit hook on the n-th rename: shards, journals, configuration, manifest and the folder
itself all appear by a rename, so this is the instant before each of them becomes visible.
"""

import json
import subprocess
import sys

import pytest
from tiny_models import build_tiny_model

from fourfold.compress import Recipe, plan, quantize
from fourfold.core.errors import UsageError

HELPER = '''
import hashlib, json, os, shutil, signal, sys
from pathlib import Path
from fourfold.compress import quantize
import fourfold.checkpoint.dialects.compressed_tensors, fourfold.formats.mxfp4, fourfold.compress.passes.rtn

source, place, shard_bytes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

def run(out, kill_at=None, resume=False):
    """Fork, quantize, and give the child's exit: 0, or minus the signal."""
    pid = os.fork()
    if pid == 0:
        seen = 0
        def hook(event, arguments):
            nonlocal seen
            if event == "os.rename":
                seen += 1
                if seen == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        code = 1
        try:
            quantize(source, out, resume=resume, max_shard_bytes=shard_bytes)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def digest(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}

(place / "whole").mkdir()
assert run(place / "whole" / "out") == 0
whole = digest(place / "whole" / "out")
results, kill_at = [], 1
while True:
    folder = place / str(kill_at)
    folder.mkdir()
    killed = run(folder / "out", kill_at)
    if killed == 0:
        break
    durable = len(list((folder / "out.partial").glob("*.safetensors")))
    resumed = run(folder / "out", resume=True)
    found = digest(folder / "out") if resumed == 0 else {}
    differing = sorted(n for n in whole.keys() | found.keys() if whole.get(n) != found.get(n))
    results.append({"killed": killed, "durable": durable, "resumed": resumed, "differing": differing})
    shutil.rmtree(folder)
    kill_at += 1
print(json.dumps(results))
'''
SHARD_BYTES = 60_000


def test_a_kill_before_any_rename_and_a_resume_give_the_same_bytes(tiny_llama, tmp_path):
    shards = plan(tiny_llama, max_shard_bytes=SHARD_BYTES).shards
    assert shards >= 3
    done = subprocess.run(
        [sys.executable, "-c", HELPER, str(tiny_llama), str(tmp_path), str(SHARD_BYTES)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert {r["killed"] for r in results} == {-9}
    assert [r for r in results if r["resumed"] != 0 or r["differing"]] == []
    # every number of finished shards, from none to all, was met
    assert {r["durable"] for r in results} == set(range(shards + 1))


class StoppedError(Exception):
    pass


def stop(done: int, total: int, name: str) -> None:
    if done > total / 2:
        raise StoppedError


def test_a_resume_with_something_else_is_refused_by_its_name(tiny_llama, tiny_qwen3, tmp_path):
    out, rule = tmp_path / "out", {"weight": "mxfp4"}
    even, floor = (
        Recipe.model_validate({"name": "own", "rules": [rule | {"scale_rule": name}], "passes": ["rtn"]})
        for name in ("even", "floor")
    )

    def run(source=tiny_llama, recipe=even, **changes):
        return quantize(source, out, recipe, **({"max_shard_bytes": SHARD_BYTES, "resume": True} | changes))

    with pytest.raises(StoppedError):
        run(progress=stop, resume=False)
    for call in (
        lambda: run(recipe=floor),
        lambda: run(source=tiny_qwen3),
        lambda: run(max_shard_bytes=2 * SHARD_BYTES),
        lambda: run(dialect="quark"),
    ):
        with pytest.raises(UsageError, match=r"was started with another \w+: \S+ then, \S+ now"):
            call()
    with pytest.raises(UsageError, match="--resume"):
        run(resume=False)
    assert run().recipe == even.model_dump()


def test_a_source_that_changed_between_is_noticed(tmp_path):
    source = build_tiny_model(tmp_path / "source")
    with pytest.raises(StoppedError):
        quantize(source, tmp_path / "out", progress=stop, max_shard_bytes=SHARD_BYTES)
    build_tiny_model(source, seed=5)
    with pytest.raises(UsageError, match="another source"):
        quantize(source, tmp_path / "out", resume=True, max_shard_bytes=SHARD_BYTES)

"""Copying a checkpoint takes the memory of its largest tensor and a constant, not that of the checkpoint."""

import json
import subprocess
import sys

from fourfold.checkpoint.storage.header import PlannedTensor, build_header

MIB = 1 << 20
TENSORS, TENSOR_MIB, ALLOWED_MIB = 30, 8, 64

COPY = """
import resource, sys, re
from pathlib import Path
import torch
from fourfold.checkpoint.convert import convert

torch.set_num_threads(1)
source, out, allowed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
now = int(re.search(r"VmData:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (now + allowed, now + allowed))
try:
    torch.empty(3 * allowed, dtype=torch.uint8)
    sys.exit("the limit does not hold")
except RuntimeError:
    pass
convert(source, out, "plain")
"""


def test_a_checkpoint_larger_than_the_allowed_memory_is_copied(tmp_path):
    import torch

    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": "llama"}))
    shape = (TENSOR_MIB, MIB // 2)
    header = build_header([PlannedTensor(f"t{i}", torch.bfloat16, shape) for i in range(TENSORS)], {})
    with (source / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(
            len(header) + TENSORS * TENSOR_MIB * MIB
        )  # a sparse file: no disk, but real bytes to read
    size = (source / "model.safetensors").stat().st_size
    assert size > 3 * ALLOWED_MIB * MIB
    command = [sys.executable, "-c", COPY, str(source), str(out), str(ALLOWED_MIB * MIB)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert abs((out / "model.safetensors").stat().st_size - size) < 100

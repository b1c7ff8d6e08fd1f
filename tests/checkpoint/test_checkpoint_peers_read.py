"""transformers with compressed-tensors loads our output and gives the logits of the expanded weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import projections, quantize_folder
from safetensors.torch import save_file
from tiny_models import build_architecture

from fourfold.checkpoint import open_checkpoint
from fourfold.formats import BlockTensor


def logits(folder, dtype: torch.dtype) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return model(torch.arange(2, 40)[None]).logits.float()


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def source(request, tmp_path_factory) -> Path:
    """A model without experts, and one with four in a layer, which transformers puts together again."""
    return build_architecture(tmp_path_factory.mktemp("source") / request.param, request.param)


@pytest.fixture(scope="module")
def mxfp4_folder(tmp_path_factory, source) -> Path:
    """The model in MXFP4, compressed-tensors."""
    out = tmp_path_factory.mktemp("quantized") / "mxfp4"
    return quantize_folder(source, out, "compressed-tensors", projections())


@pytest.fixture(scope="module")
def expanded(mxfp4_folder, tmp_path_factory):
    """The same with plain bf16 weights: E2M1 times a power of two is exact in bf16."""
    folder = tmp_path_factory.mktemp("expanded")
    checkpoint = open_checkpoint(mxfp4_folder)
    tensors = {}
    for name in checkpoint.names():
        value = checkpoint.load(name)
        tensors[name] = value.dequantize(torch.bfloat16) if isinstance(value, BlockTensor) else value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(checkpoint.config))
    shutil.copy(mxfp4_folder / "generation_config.json", folder)
    return folder


def test_transformers_gives_our_logits(mxfp4_folder, expanded):
    theirs, plain = logits(mxfp4_folder, torch.bfloat16), logits(expanded, torch.bfloat16)
    # same weights to the bit and the same bf16 arithmetic, so nothing may differ
    assert theirs.shape == (1, 38, 256) and plain.abs().max() > 0.05
    torch.testing.assert_close(theirs, plain, rtol=0, atol=0)


def test_the_rounding_shows_in_the_logits(expanded, source):
    # the comparison above would mean nothing if quantizing changed nothing
    assert not torch.allclose(logits(expanded, torch.bfloat16), logits(source, torch.bfloat16), atol=1e-3)

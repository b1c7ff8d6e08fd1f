"""Checkpoints in float16 and float32: fast as those in bfloat16, and as they are where that is asked for."""

import json

import numpy as np
import pytest
import torch
from engine_models import CASES, build_case, load, prompt, values_witness, witness, witness_logits
from safetensors.torch import load_file, save_file

from fourfold.compress import quantize
from fourfold.kernels import native_available

pytestmark = pytest.mark.skipif(not native_available(), reason="the C++ extension is not built")

DTYPES = {"float16": torch.float16, "float32": torch.float32}
FIRST = [(model, next(iter(cases))) for model, cases in CASES.items()]
TOKENS = prompt(150)


def in_dtype(folder, name):
    """The model with every bit of the dtype ``name`` in use."""
    generator = torch.Generator().manual_seed(1)
    for file in folder.glob("*.safetensors"):
        tensors = {
            key: (value.float() * (1 + 2**-9 * torch.randn(value.shape, generator=generator))).to(
                DTYPES[name]
            )
            for key, value in load_file(file).items()
        }
        save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"dtype": name}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def error(ours, exact):
    """Root mean square difference of a position's logits over how much they vary: the median one."""
    return float(np.median(np.sqrt(np.mean((ours - exact) ** 2, -1)) / exact.std()))


@pytest.fixture(scope="module", params=[(*case, name) for case in FIRST for name in DTYPES], ids="-".join)
def models(request, tmp_path_factory):
    """A model, the same in MXFP4, and transformers' logits of both in float32."""
    *case, name = request.param
    where = tmp_path_factory.mktemp("dtypes")
    source = in_dtype(build_case(where / "source", *case), name)
    quantize(source, where / "mxfp4", "mxfp4")
    values = values_witness(source, where / "mxfp4", where / "values")
    expected = [witness_logits(model, TOKENS) for model in (witness(source), values)]
    return [source, where / "mxfp4"], expected


def test_they_are_computed_natively(models):
    for folder, exact, bound in zip(*models, (0.015, 0.025), strict=True):
        engine = load(folder, dtype="auto")
        assert engine.arithmetic == "int8" and engine.cache.data.dtype == torch.bfloat16
        assert error(engine.logits(TOKENS), exact) < bound


def test_keys_and_embeddings_in_float32_where_that_is_asked_for(models):
    for folder, exact, bound in zip(*models, (0.015, 0.025), strict=True):
        engine = load(folder, dtype="float32", arithmetic="int8")
        assert engine.arithmetic == "int8" and engine.cache.data.dtype == torch.float32
        assert error(engine.logits(TOKENS), exact) < bound


def test_exact_keeps_the_checkpoints_numbers(models):
    for folder, exact in zip(*models, strict=True):
        engine = load(folder, dtype="auto", arithmetic="exact")
        assert engine.arithmetic == "torch: the model is to be computed in float32"
        # 16 bits of every input are taken for float16, which has 11
        atol = 2e-4 if json.loads((folder / "config.json").read_text())["dtype"] == "float16" else 2e-5
        np.testing.assert_allclose(engine.logits(TOKENS), exact, rtol=1e-4, atol=atol)

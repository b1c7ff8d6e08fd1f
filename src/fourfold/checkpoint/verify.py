"""Is this folder whole? Hashes, headers, shapes against the configuration, scales that are numbers, and every
tensor against the digest of what was in memory when it was written.

Everything is read once, tensor by tensor. What is found is reported, all of it, and not raised.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from fourfold.checkpoint.checkpoint import Checkpoint
from fourfold.checkpoint.dialect import get_dialect, kept_linears
from fourfold.checkpoint.digests import DIGESTS_NAME, digest, read_digests
from fourfold.checkpoint.folder import CONFIG, read_model_config
from fourfold.checkpoint.journal import JOURNAL
from fourfold.checkpoint.kv_scales import kv_scale_problems
from fourfold.checkpoint.sources import QUANTIZATION_CONFIG, manifest_of, open_folder
from fourfold.core.durable import sha256_of
from fourfold.core.errors import FourfoldError, UsageError
from fourfold.core.manifest import MANIFEST_NAME, Manifest
from fourfold.core.records import Record
from fourfold.formats import BlockTensor, get_format

E8M0_NAN = 0xFF
E4M3_NAN = 0x7F
PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# where a configuration says one of these, its layers are of several shapes, or of other projections
UNLIKE_LAYERS = ("kv_lora_rank", "per_layer_config", "global_head_dim", "num_attention_heads_per_layer")
COMPUTED_WITH = (".weight", ".bias", "_proj", "_proj_bias")


class VerifyReport(Record):
    """What ``fourfold verify`` found; ``passed`` is true when there are no problems."""

    kind: Literal["fourfold.verify/1"] = "fourfold.verify/1"
    folder: str
    dialect: str | None
    tensors: int
    quantized_tensors: int
    size_bytes: int
    files_hashed: int
    tensors_compared: int = 0
    problems: list[str]
    passed: bool


def verify(folder: Path) -> VerifyReport:
    """Check a checkpoint folder. Raises UsageError only when ``folder`` is none, or an unfinished run's."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder. Name a checkpoint's folder.")
    if (folder / JOURNAL).is_file():
        raise UsageError(
            f"{folder} belongs to a run that has not finished. Give its command again with --resume, and "
            "verify what it makes."
        )
    problems: list[str] = []
    hashed = 0
    digests: dict[str, str] = {}
    checkpoint: Checkpoint | None = None
    try:
        manifest = manifest_of(folder)
        hashed = len(manifest.sha256) if manifest else 0
        problems += _hash_problems(folder, manifest) if manifest else _manifest_problems(folder)
        checkpoint = open_folder(folder)
        problems += _shape_problems(checkpoint)
        problems += _dtype_problems(checkpoint)
        problems += _config_problems(folder, checkpoint)
        infos = [checkpoint.info(name) for name in checkpoint.names()]
        form, scales = checkpoint.quantization.kv_cache, checkpoint.kv_scales
        problems += kv_scale_problems(form, infos, checkpoint.config, scales)
        if found := read_digests(folder):
            digests = found.tensors
        problems += _tensor_problems(checkpoint, digests)
    except FourfoldError as error:
        problems.append(str(error))
    infos = [checkpoint.info(name) for name in checkpoint.names()] if checkpoint else []
    return VerifyReport(
        folder=str(folder),
        dialect=checkpoint.dialect if checkpoint else None,
        tensors=len(infos),
        quantized_tensors=sum(info.format is not None for info in infos),
        size_bytes=sum(info.nbytes for info in infos),
        files_hashed=hashed,
        tensors_compared=len(digests),
        problems=problems,
        passed=not problems,
    )


def _manifest_problems(folder: Path) -> Iterator[str]:
    if (folder / DIGESTS_NAME).is_file():
        yield f"{MANIFEST_NAME} is missing, so the files cannot be compared with their hashes. Copy it again."


def _hash_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    for name, expected in manifest.sha256.items():
        path = folder / name
        if Path(name).name != name:
            yield f"{MANIFEST_NAME} names '{name}', which is no file of this folder."
        elif not path.is_file():
            yield f"{name} is missing. Copy the folder again."
        elif sha256_of(path) != expected:
            yield f"{name} is not what was written (its sha256 differs). Copy the folder again."
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in manifest.sha256:
            yield f"{path.name} is not in {MANIFEST_NAME}: it was added later. Remove it."


def _shape_problems(checkpoint: Checkpoint) -> Iterator[str]:
    expected = expected_shapes(checkpoint.config)
    for name in checkpoint.names():
        suffix = ".".join(name.split(".")[-3:])
        want = expected.get(suffix, expected.get(name))
        have = checkpoint.info(name).shape
        if want is not None and have != want:
            yield f"{name} has the shape {list(have)}, but {CONFIG} asks for {list(want)}."
    layers = checkpoint.config.get("num_hidden_layers")
    if isinstance(layers, int):
        present = {name.split(".")[2] for name in checkpoint.names() if name.startswith("model.layers.")}
        for index in range(layers):
            if present and str(index) not in present:
                yield f"Layer {index} of the {layers} that {CONFIG} asks for has no tensors."


def _dtype_problems(checkpoint: Checkpoint) -> Iterator[str]:
    """Parameters whose values mean nothing without scales; integer buffers of other names are left alone."""
    for info in map(checkpoint.info, checkpoint.names()):
        if info.dtype is None or info.dtype in PLAIN_DTYPES:
            continue
        if info.name.endswith(COMPUTED_WITH) or info.dtype.is_floating_point:
            yield (
                f"{info.name} is stored as {str(info.dtype).removeprefix('torch.')} without scales, which no "
                "reader can compute with. Fetch the file again, or start from the unquantized model."
            )


def expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Shapes [out, in] that a dense decoder's configuration implies, by the end of the parameter's name."""

    def number(key: str, default: int | None = None) -> int | None:
        value = config.get(key, default)
        return value if isinstance(value, int) else default

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    if hidden is None or heads is None or any(config.get(key) for key in UNLIKE_LAYERS):
        return {}
    head = number("head_dim", hidden // max(1, heads)) or 0
    queries, keys = heads * head, (number("num_key_value_heads", heads) or 0) * head
    shapes = {"self_attn.k_proj.weight": (keys, hidden), "self_attn.v_proj.weight": (keys, hidden)}
    shapes["self_attn.o_proj.weight"] = (hidden, queries)
    # Qwen3-Next and Qwen3.5 hold the gate of the output in q_proj, and not all of their files say so
    always_gated = str(config.get("model_type")).startswith(("qwen3_next", "qwen3_5"))
    if not config.get("attn_output_gate", always_gated):
        shapes["self_attn.q_proj.weight"] = (queries, hidden)
    if (vocabulary := number("vocab_size")) is not None:
        shapes |= {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    has_experts = any("expert" in key and value for key, value in config.items())
    if (width := number("intermediate_size")) is not None and not has_experts:
        shapes |= {f"mlp.{name}_proj.weight": (width, hidden) for name in ("gate", "up")}
        shapes["mlp.down_proj.weight"] = (hidden, width)
    return shapes


def _config_problems(folder: Path, checkpoint: Checkpoint) -> Iterator[str]:
    settings = read_model_config(folder).get(QUANTIZATION_CONFIG)
    if settings is None:
        return
    dialect = get_dialect(checkpoint.dialect)
    infos = [checkpoint.info(name) for name in checkpoint.names()]
    present = {info.name for info in infos}
    for module in kept_linears(infos):
        if f"{module}.weight" in present and not dialect.says_kept(settings, module):
            yield (
                f"{module} is stored unquantized, but {QUANTIZATION_CONFIG} does not say so; readers will "
                "look for its scales. Add it to the list of what is kept, or write the folder again."
            )


def _tensor_problems(checkpoint: Checkpoint, digests: dict[str, str]) -> Iterator[str]:
    for name in digests.keys() - set(checkpoint.names()):
        yield f"{name} is named in {DIGESTS_NAME} but not to be found. Copy the folder again."
    for name in checkpoint.names():
        value = checkpoint.load(name)
        if name in digests and digest(value) != digests[name]:
            yield (
                f"{name} is not the tensor that was in memory when it was written. Copy the folder again; if "
                "that does not help, quantize the source again."
            )
        if isinstance(value, BlockTensor) and (count := _bad_scales(value)):
            yield f"{name} has {count} scales that are no numbers. Quantize the source again."


def _bad_scales(value: BlockTensor) -> int:
    kind = get_format(value.format).scale
    if kind == "e8m0":
        bad = value.scales == E8M0_NAN
    elif kind == "e4m3":
        bad = (value.scales & E4M3_NAN) == E4M3_NAN
    else:
        bad = ~torch.isfinite(value.scales.float())
    whole = value.global_scale
    return int(bad.sum()) + int(whole is not None and not torch.isfinite(whole).all())

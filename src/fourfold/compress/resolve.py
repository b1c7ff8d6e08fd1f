"""From a checkpoint and a recipe to the model to be made: every tensor's fate, decided before anything is
read.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from fourfold.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from fourfold.checkpoint.checkpoint import no_tokenizer
from fourfold.checkpoint.dialect import module_of
from fourfold.compress.experts import parse_fused, unfuse, unknown_layout
from fourfold.compress.model import Entry, FusedReader, Model, Value, is_finite, plain, retyped
from fourfold.compress.names import check_orientation, kept_reason, looks_stacked, not_linear
from fourfold.compress.recipe import Recipe, first_match
from fourfold.core.errors import FourfoldError, UsageError
from fourfold.core.quantization import LayerScheme, Quantization
from fourfold.formats import get_format

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROUNDED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Resolved:
    """The model before its passes, why each kept tensor is kept, and what in the recipe may be a mistake."""

    model: Model
    kept: dict[str, str]
    notes: list[str]


def open_source(source: str | Path) -> Checkpoint:
    """``source`` opened. Raises FourfoldError when it lacks the tokenizer that is needed at the end."""
    checkpoint = open_checkpoint(source)
    if not checkpoint.has_tokenizer():
        raise no_tokenizer(str(source))
    return checkpoint


def resolve(checkpoint: Checkpoint, recipe: Recipe) -> Resolved:
    """Decide about every tensor of ``checkpoint``.

    Raises FourfoldError for a shape or a layout that cannot be rounded, UsageError for a source that is
    quantized already.
    """
    _refuse_quantized(checkpoint, recipe)
    entries: dict[str, Entry] = {}
    layers: dict[str, LayerScheme] = {}
    kept: dict[str, str] = {}
    for name, entry in _entries(checkpoint, recipe):
        reason = _reason(name, entry.info, recipe)
        if reason is None:
            layers[module_of(name)] = _scheme(name, entry.info, recipe, checkpoint)
        else:
            kept[name] = reason
            entry = _cast(_checked(name, entry, recipe), recipe, checkpoint.dialect)
        entries[name] = entry
    if not entries:
        raise FourfoldError(f"{checkpoint.source} holds no tensors. Fetch its weights again.")
    if recipe.formats and not layers:
        raise UsageError(
            f"The recipe '{recipe.name}' rounds nothing in {checkpoint.source}: no linear weight of a "
            "decoder layer matches its rules. Look at the names with --recipe bf16 --dry-run."
        )
    quantization = Quantization(layers=layers, kv_cache=recipe.kv_cache)
    return Resolved(Model(checkpoint.config, entries, quantization), kept, _unmatched(checkpoint, recipe))


def _unmatched(checkpoint: Checkpoint, recipe: Recipe) -> list[str]:
    """A note on the recipe's patterns that match nothing. No error: a recipe may serve several models."""
    patterns = dict.fromkeys([*recipe.keep, *(glob for rule in recipe.rules for glob in rule.modules)])
    modules = set(_modules(checkpoint))
    lost = [p for p in patterns if p not in modules and not any(first_match([p], m) for m in modules)]
    if not lost:
        return []
    named = ", ".join(f"'{pattern}'" for pattern in lost[:3]) + (", …" if len(lost) > 3 else "")
    return [
        f"Nothing in this model matches what the recipe names: {named}. A pattern is a glob on a module's "
        "whole name, which does not end in .weight; --dry-run lists every tensor."
    ]


def _modules(checkpoint: Checkpoint) -> Iterator[str]:
    """Every name that a pattern can mean: of what is stored, and of each expert in what is fused."""
    for name in checkpoint.names():
        module, shape = module_of(name), checkpoint.info(name).shape
        yield from (module, module.removesuffix("_bias"))
        if (fused := parse_fused(name, shape)) is not None:
            yield from (f"{fused.experts}.{e}.{p}" for e in range(shape[0]) for p in fused.projections)


def _entries(checkpoint: Checkpoint, recipe: Recipe) -> Iterator[tuple[str, Entry]]:
    """The checkpoint's tensors, with fused experts in pieces wherever a rule rounds one of them."""
    infos = {name: checkpoint.info(name) for name in checkpoint.names()}
    shapes = {name: info.shape for name, info in infos.items()}
    apart = _experts_to_cut(shapes, recipe)
    reader = FusedReader(checkpoint)
    for name, info in infos.items():
        if name not in apart:
            yield name, Entry(info, partial(checkpoint.load, name), info)
            continue
        assert info.dtype is not None, "quantized sources were refused"
        pieces = unfuse(name, shapes, checkpoint.config)
        for piece in pieces:
            nbytes = torch.Size(piece.shape).numel() * info.dtype.itemsize
            of_piece = TensorInfo(piece.name, piece.shape, info.dtype, None, nbytes)
            yield piece.name, Entry(of_piece, partial(reader.take, name, piece, len(pieces)), info)


def _experts_to_cut(shapes: dict[str, tuple[int, ...]], recipe: Recipe) -> set[str]:
    """The fused tensors of every layer of which the recipe rounds an expert; the others stay as they are.

    Weights and biases of one layer go together, because a reader expects all or none of them one by one; only
    what a `keep` entry names itself stays fused.
    """
    cut: dict[str, set[str]] = {}
    rounded: set[str] = set()
    for name, shape in shapes.items():
        fused = parse_fused(name, shape)
        if fused is None or first_match(recipe.keep, module_of(name.removesuffix("_bias"))):
            continue
        cut.setdefault(fused.experts, set()).add(name)
        modules = (f"{fused.experts}.{e}.{p}.weight" for e in range(shape[0]) for p in fused.projections)
        if any(kept_reason(module, recipe) is None for module in modules):
            rounded.add(fused.experts)
    return {name for experts in rounded for name in cut[experts]}


def _reason(name: str, info: TensorInfo, recipe: Recipe) -> str | None:
    """Why the tensor is kept, or None when it is rounded. Raises FourfoldError for what nobody can tell."""
    if not recipe.formats:
        return "the recipe rounds nothing"
    if parse_fused(name, info.shape):
        return "experts kept by the recipe"
    reason = not_linear(name, info.shape) or kept_reason(name, recipe)
    if reason and looks_stacked(name, info.shape) and not first_match(recipe.keep, module_of(name)):
        raise unknown_layout(name, info.shape, "its layout")
    return reason


def _scheme(name: str, info: TensorInfo, recipe: Recipe, checkpoint: Checkpoint) -> LayerScheme:
    """The scheme of a weight that is rounded, once it is seen that it can be."""
    check_orientation(name, checkpoint.config)
    rule = recipe.rule_for(module_of(name))
    scheme = rule and rule.scheme()
    assert scheme is not None
    block_format = get_format(scheme.weight)
    if block_format.block_size and info.shape[-1] % block_format.block_size:
        raise FourfoldError(
            f"{name} has the shape {list(info.shape)}: its input dimension {info.shape[-1]} is no multiple "
            f"of {block_format.block_size}, the block of {scheme.weight}. Nothing was written. Add a `keep` "
            f"entry '{every_such(name)}' to the recipe, or choose a format with smaller blocks (nvfp4) or "
            "none (fp8-channel)."
        )
    if info.dtype not in ROUNDED_DTYPES:
        raise FourfoldError(
            f"{name} is stored as {str(info.dtype).removeprefix('torch.')}, from which Fourfold does not "
            f"round. Bring the model to bf16 first, or add a `keep` entry '{module_of(name)}' to the recipe."
        )
    if scheme.scale_rule is None and block_format.default_rule is not None:
        return scheme.model_copy(update={"scale_rule": block_format.default_rule.value})
    return scheme


def every_such(name: str) -> str:
    """The glob of a weight's module in every layer, and of every expert, which have the same shapes."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", module_of(name))


def _checked(name: str, entry: Entry, recipe: Recipe) -> Entry:
    """``entry``, which is kept, refused when it is read and not finite, unless the recipe names it itself."""
    if entry.info.dtype not in ROUNDED_DTYPES or first_match(recipe.keep, module_of(name)):
        return entry

    def load() -> Value:
        value = entry.load()
        if not is_finite(value):
            raise FourfoldError(
                f"{name} holds NaN or Inf. The source is damaged or the model diverged: fetch it again, or, "
                f"if it is to be so, add a `keep` entry '{module_of(name)}' to the recipe."
            )
        return value

    return replace(entry, load=load)


def _cast(entry: Entry, recipe: Recipe, dialect: str) -> Entry:
    """``entry`` in the recipe's dtype, without blocks; fused experts as transformers holds them."""
    if recipe.dtype is None:
        return entry
    dtype = DTYPES[recipe.dtype]
    info = retyped(entry.info, dtype)
    if dialect != "mxfp4" or entry.info.format is None:
        return replace(entry, info=info, load=lambda: plain(entry.load(), dtype))
    # gpt-oss packs experts as [E, out, in], and transformers expands them to [E, in, out]
    *leading, rows, columns = info.shape
    info = replace(info, shape=(*leading, columns, rows))
    return replace(entry, info=info, load=lambda: plain(entry.load(), dtype).mT)


def _refuse_quantized(checkpoint: Checkpoint, recipe: Recipe) -> None:
    held = sorted({info.format for info in map(checkpoint.info, checkpoint.names()) if info.format})
    if held and (recipe.formats or recipe.dtype is None):
        raise UsageError(
            f"{checkpoint.source} is quantized already ({', '.join(held)}), and rounding rounded weights "
            "again would lose accuracy without a trace. Start from the original model; to change only the "
            "dialect use `fourfold convert`, to expand it to bf16 the recipe bf16."
        )

"""A quantized copy of a folder, made with the formats room and the writer under test."""

from collections.abc import Callable
from pathlib import Path

from fourfold.checkpoint import CheckpointWriter, TensorInfo, open_checkpoint
from fourfold.core.quantization import LayerScheme, Quantization
from fourfold.formats import get_format

SchemeOf = Callable[[str], LayerScheme | None]

GOLDENS = Path(__file__).parent / "goldens"


def projections(weight: str = "mxfp4", activation: str | None = None) -> SchemeOf:
    """One scheme for every projection inside the layers; all else is kept."""
    rule = get_format(weight).default_rule
    scheme = LayerScheme(weight=weight, activation=activation, scale_rule=rule.value if rule else None)
    return lambda module: scheme if ".layers." in module and module.endswith("_proj") else None


def quantize_folder(
    source: Path,
    out: Path,
    dialect: str,
    scheme_of: SchemeOf,
    *,
    kv_cache: str | None = None,
    stop_after: int | None = None,
    fingerprint: dict[str, str] | None = None,
    **options,
) -> Path:
    """Round-to-nearest into ``out``; ``stop_after`` leaves after so many shards, as a kill would."""
    checkpoint = open_checkpoint(source)
    layers = {n.removesuffix(".weight"): scheme_of(n.removesuffix(".weight")) for n in checkpoint.names()}
    chosen = {module: scheme for module, scheme in layers.items() if scheme is not None}
    infos = [checkpoint.info(name) for name in checkpoint.names()]
    plan = [
        TensorInfo(i.name, i.shape, None, chosen[i.name.removesuffix(".weight")].weight, 0)
        if i.name.removesuffix(".weight") in chosen
        else i
        for i in infos
    ]
    writer = CheckpointWriter(
        out,
        dialect,
        checkpoint.config,
        Quantization(layers=chosen, kv_cache=kv_cache),
        plan,
        fingerprint=fingerprint or {"source": "the tiny model"},
        **options,
    )
    for count, shard in enumerate(writer.pending()):
        if count == stop_after:
            return out
        with writer.shard(shard.index) as file:
            for info in shard.tensors:
                value = checkpoint.load(info.name)
                file.write(
                    info.name, value if info.format is None else get_format(info.format).quantize(value)
                )
    writer.finish(
        source=str(source),
        notes=checkpoint.notes,
        generation_config=checkpoint.generation_config,
        write_tokenizer=checkpoint.write_tokenizer if checkpoint.has_tokenizer() else None,
    )
    return out

"""A short name for what a source holds, by which a resumed run knows that it goes on with the same.

The source counts by its configuration, every tensor's name, dtype and shape, the sizes of its files, and
64 KiB from the middle of each file. That takes milliseconds where hashing all bytes takes minutes, tells
apart two models of one architecture, and holds when a folder is moved or copied; it does not notice a single
weight changed by hand between a kill and its ``--resume``.
"""

import hashlib
import json
from pathlib import Path

from fourfold.checkpoint.checkpoint import Checkpoint

SAMPLE_BYTES = 65536


def source_fingerprint(checkpoint: Checkpoint) -> str:
    """16 hexadecimal digits. Raises OSError when a file of the source has gone."""
    infos = map(checkpoint.info, checkpoint.names())
    tensors = [[i.name, i.shape, str(i.dtype), i.format, i.shard] for i in infos]
    return short_hash([checkpoint.config, tensors, _file_samples(checkpoint)])


def short_hash(value: object) -> str:
    """The first 16 hexadecimal digits of the sha256 of ``value`` as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _file_samples(checkpoint: Checkpoint) -> list[list[object]]:
    shards = {checkpoint.info(name).shard for name in checkpoint.names()}
    source = Path(checkpoint.source)
    files = [source] if checkpoint.folder is None else [checkpoint.folder / shard for shard in sorted(shards)]
    samples: list[list[object]] = []
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - SAMPLE_BYTES) // 2)
            samples.append([path.name, size, hashlib.sha256(file.read(SAMPLE_BYTES)).hexdigest()])
    return samples

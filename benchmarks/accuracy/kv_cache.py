"""What a quantized KV cache costs at long context: KL and loss by position, format by format.

python benchmarks/accuracy/kv_cache.py MODEL --calibration TEXT --text HELDOUT [HELDOUT ...] --work FOLDER

Weights stay as they are. FP8 scales are calibrated on the first sequences of TEXT, with transformers'
modules. Of each text one window is read from its beginning, by Fourfold's engine, with an unquantized cache
and then with each format. KL(unquantized || quantized) and the difference in loss are paired by token.
Intervals: 95 %, Student, over windows. Asserted: every text holds a whole window, and of the first one the
engine's loss with the unquantized cache is that of transformers.
"""

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from fourfold.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from fourfold.checkpoint.convert import copy_shards
from fourfold.checkpoint.kv_scales import cached_projections
from fourfold.compress.kv_calibration import KVObserver, scales
from fourfold.core.quantization import KVCacheFormat
from fourfold.engine import Engine, EngineConfig

CALIBRATED: tuple[KVCacheFormat, ...] = ("fp8", "fp8-head")
UNCALIBRATED = ("fp8 (scale 1)", "mxfp8-e4m3", "mxfp4")
EDGES = (0, 256, 512, 1024, 2048)
SLICE = 256
FURTHEST = 0.01  # nats per token between bf16 here and float32 there


def main() -> None:
    """Calibrate, read every window with every format, print a table and write the figures."""
    options = arguments()
    torch.set_num_threads(options.threads)
    checkpoint = open_checkpoint(options.model)
    engines = {"none": load(options, options.model, "none")}
    if calibrated := [kind for kind in CALIBRATED if kind in options.formats]:
        observer = calibrate(checkpoint, options)
        for kind in calibrated:
            engines[kind] = load(
                options, with_scales(checkpoint, options.work / kind, kind, observer), "auto"
            )
    for name in [name for name in UNCALIBRATED if name in options.formats]:
        engines[name] = load(options, options.model, name.partition(" ")[0])
    figures = measure(engines, options)
    for name, rows in figures.items():
        print(name, *(f"{key}: KL {kl}, loss {loss}" for key, (kl, loss) in rows.items()), sep="\n  ")
    record = {"figures": figures, "options": {key: str(value) for key, value in vars(options).items()}}
    (options.work / "kv_cache.json").write_text(json.dumps(record, indent=1))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--work", type=Path, required=True)
    names = [*CALIBRATED, *UNCALIBRATED]
    parser.add_argument("--formats", nargs="+", choices=names, default=names)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-tokens", type=int, default=512)
    parser.add_argument("--window-tokens", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def load(options: argparse.Namespace, folder: Path, kv_cache: str) -> Engine:
    """An engine that is asked for logits only."""
    config = {"kv_cache": kv_cache, "dtype": options.dtype, "threads": options.threads}
    return Engine.load(folder, EngineConfig.model_validate(config | {"kv_cache_tokens": 16}))


def calibrate(checkpoint: Checkpoint, options: argparse.Namespace) -> KVObserver:
    """The largest keys and values of transformers' model over the calibration text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    observer = KVObserver()
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | {"past_key_values": observer}), with_kwargs=True
        )
    count = options.samples * options.sequence_tokens
    text = options.calibration.read_text()[: 20 * count]
    ids = AutoTokenizer.from_pretrained(checkpoint.folder)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for row in ids[0, :count].view(options.samples, -1):
            model.model(row[None], use_cache=False)
    return observer


def with_scales(checkpoint: Checkpoint, out: Path, kind: KVCacheFormat, observer: KVObserver) -> Path:
    """``checkpoint`` again, its weights as they are, with a calibrated KV cache."""
    infos = [checkpoint.info(name) for name in checkpoint.names()]
    scheme = checkpoint.quantization.model_copy(update={"kv_cache": kind})
    found = scales(observer, kind, cached_projections(infos))
    writer = CheckpointWriter(
        out, "compressed-tensors", checkpoint.config, scheme, infos, fingerprint={}, kv_scales=found
    )
    copy_shards(checkpoint, writer)
    writer.finish(source=checkpoint.source, write_tokenizer=checkpoint.write_tokenizer)
    return out


def measure(engines: dict[str, Engine], options: argparse.Namespace) -> dict[str, dict[str, list[str]]]:
    """By format and range of positions: KL and difference in loss, each with its interval."""
    samples: dict[str, list[np.ndarray]] = {name: [] for name in engines if name != "none"}
    for path in options.text:
        ids = engines["none"].encode(path.read_text())[: options.window_tokens]
        assert len(ids) == options.window_tokens, f"{path} has {len(ids)} tokens, fewer than a window"
        base = torch.from_numpy(engines["none"].logits(ids))
        if path == options.text[0]:
            check(base, ids, options.model)
        for name, own in samples.items():
            begin = time.perf_counter()
            own.append(differences(base, torch.from_numpy(engines[name].logits(ids)), ids))
            seconds = time.perf_counter() - begin
            print(path.name, len(ids), name, own[-1].mean(1), f"{seconds:.1f} s", flush=True)
    edges = [edge for edge in EDGES if edge < options.window_tokens] + [options.window_tokens]
    ranges = {f"{a} to {b}": slice(a, b) for a, b in pairwise(edges)} | {"all": slice(None)}
    return {
        name: {
            key: [interval([w[i, part].mean() for w in own]) for i in (0, 1)] for key, part in ranges.items()
        }
        for name, own in samples.items()
    }


def check(logits: torch.Tensor, ids: list[int], model: Path) -> None:
    """The engine's loss on ``ids`` [T] with ``logits`` [T, V] is that of transformers in float32."""
    from transformers import AutoModelForCausalLM

    tokens = torch.tensor(ids)
    with torch.no_grad():
        other = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(tokens[None]).logits[0]
    ours, theirs = (float(torch.nn.functional.cross_entropy(x[:-1], tokens[1:])) for x in (logits, other))
    assert abs(ours - theirs) < FURTHEST, f"loss {ours:.4f} here, {theirs:.4f} in transformers"


def differences(base: torch.Tensor, other: torch.Tensor, ids: list[int]) -> np.ndarray:
    """[2, T - 1]: KL(base || other) in nats, and loss minus the base's."""
    targets, parts = torch.tensor(ids[1:])[:, None], []
    for start in range(0, len(ids) - 1, SLICE):
        rows = slice(start, min(start + SLICE, len(ids) - 1))
        p, q = base[rows].log_softmax(-1), other[rows].log_softmax(-1)
        loss = (p.gather(1, targets[rows]) - q.gather(1, targets[rows]))[:, 0]
        parts.append(torch.stack([(p.exp() * (p - q)).sum(-1), loss]))
    return torch.cat(parts, 1).numpy()


def interval(values: list[float]) -> str:
    """Mean and half width; one window has no interval."""
    if len(values) < 2:
        return f"{np.mean(values):.5f}"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.5f} +- {half:.5f}"


if __name__ == "__main__":
    main()

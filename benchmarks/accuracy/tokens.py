"""Calibration tokens, made once so that every tool sees the same ones.

python benchmarks/accuracy/tokens.py TEXT MODEL OUT --samples 512 --sequence-tokens 2048 --seeds 0 1 2

Writes OUT/tokens-seed0.pt, ...: int64 tensors [samples, sequence_tokens] cut from the tokenized TEXT at
random offsets, with no special tokens. MODEL is any folder that holds a tokenizer.json. Cuts may overlap.
"""

import argparse
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer


def main() -> None:
    """Tokenize once, cut for every seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--sequence-tokens", type=int, default=2048)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    ids = torch.tensor(tokenizer.encode(options.text.read_text(), add_special_tokens=False).ids)
    length = options.sequence_tokens
    if ids.numel() < length:
        sys.exit(f"{options.text} has {ids.numel()} tokens, fewer than one sequence of {length}.")
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        file = options.out / f"tokens-seed{seed}.pt"
        torch.save(cut(ids, options.samples, length, seed), file)
        print(f"{file}: {options.samples} x {length} of {ids.numel()} tokens")


def cut(ids: torch.Tensor, samples: int, length: int, seed: int) -> torch.Tensor:
    """``samples`` windows of ``length`` at random offsets, int64 [samples, length]."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.randint(0, ids.numel() - length + 1, (samples,), generator=generator)
    return torch.stack([ids[offset : offset + length] for offset in offsets.tolist()])


if __name__ == "__main__":
    main()

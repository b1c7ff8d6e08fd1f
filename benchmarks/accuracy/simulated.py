"""Any checkpoint as a model to evaluate, computed by transformers' modules on a CPU or a GPU.

Weights are expanded from their blocks; inputs are rotated and rounded as the checkpoint asks. So checkpoints of
Fourfold, llm-compressor and Quark are judged by one and the same arithmetic.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch

from fourfold.checkpoint import open_checkpoint
from fourfold.compress.calibrated.rotation import rotation_of
from fourfold.compress.calibrated.skeleton import Skeleton
from fourfold.compress.model import Entry, Model, plain
from fourfold.formats import get_format


class SimulatedModel:
    """Satisfies ``fourfold.core.protocols.LanguageModel``. ``activation`` overrides what the checkpoint says."""

    def __init__(self, folder: str | Path, device: str, activation: str | None = None):
        from tokenizers import Tokenizer

        checkpoint = open_checkpoint(folder)
        assert checkpoint.folder is not None
        self.card = checkpoint.card()
        self.max_positions = int(checkpoint.config["max_position_embeddings"])
        self._tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
        infos = {name: checkpoint.info(name) for name in checkpoint.names()}
        entries = {n: Entry(info, partial(checkpoint.load, n), info) for n, info in infos.items()}
        model = Model(checkpoint.config, entries, checkpoint.quantization)
        self._skeleton = Skeleton(model, torch.device(device))
        self._layers = [self._layer(i, model, activation) for i in range(len(self._skeleton))]
        self._norm = self._parameter(model, "model.norm.weight")
        head = "lm_head.weight" if "lm_head.weight" in model else "model.embed_tokens.weight"
        self._head = self._parameter(model, head)
        self._eps = checkpoint.config["rms_norm_eps"]

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    @torch.no_grad()
    def logits(self, token_ids: list[int]) -> np.ndarray:
        """Float32 logits [T, V]."""
        (hidden,), calls = self._skeleton.enter([torch.tensor([token_ids])])
        for layer, call in zip(self._layers, calls[1], strict=True):
            hidden = layer(hidden, *call.args, **call.kwargs)
        hidden = torch.nn.functional.rms_norm(hidden[0], self._norm.shape, self._norm, self._eps)
        return (hidden @ self._head.T).cpu().numpy()

    def _layer(self, index: int, model: Model, activation: str | None) -> torch.nn.Module:
        layer = self._skeleton.materialise(index)
        for name, linear in self._skeleton.logical_linears(index, layer).items():
            scheme = model.quantization.layer(name)
            if scheme is None:
                continue
            rounding = activation or scheme.activation
            rotation = f"{name}.input_rotation"
            trained = plain(model[rotation]) if rotation in model else None
            linear.rotation = rotation_of(scheme, trained, self._skeleton.device)
            linear.activation = get_format(rounding) if rounding else None
            linear.rounds_input = True
        return layer

    def _parameter(self, model: Model, name: str) -> torch.Tensor:
        return plain(model[name], torch.float32).to(self._skeleton.device)

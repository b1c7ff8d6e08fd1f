"""Any checkpoint as a model to judge, computed by transformers' modules on a CPU or a GPU.

Weights are expanded from their blocks; inputs are rotated and rounded as the checkpoint asks. So checkpoints
of Fourfold, llm-compressor and Quark are judged by one and the same arithmetic, in float32.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from fourfold.checkpoint import open_checkpoint
from fourfold.compress.calibrated.rotation import rotation_of
from fourfold.compress.calibrated.skeleton import Skeleton
from fourfold.compress.model import Entry, Model, plain


@dataclass(frozen=True)
class WindowScore:
    """Sums over the ``tokens`` predicted in one window, in nats."""

    tokens: int
    loss: float
    loss_base: float
    divergence: float
    agreed: int


class SimulatedModel:
    """The model in ``folder``. ``activation`` takes the place of what the checkpoint says of inputs."""

    def __init__(self, folder: str | Path, device: str, activation: str | None = None):
        checkpoint = open_checkpoint(folder)
        infos = {name: checkpoint.info(name) for name in checkpoint.names()}
        entries = {n: Entry(info, partial(checkpoint.load, n), info) for n, info in infos.items()}
        model = Model(checkpoint.config, entries, checkpoint.quantization)
        self._skeleton = Skeleton(model, torch.device(device))
        self._layers = [self._layer(i, model, activation) for i in range(len(self._skeleton))]
        self._norm = self._parameter(model, "model.norm.weight")
        head = "lm_head.weight" if "lm_head.weight" in model else "model.embed_tokens.weight"
        self._head = self._parameter(model, head)
        self._eps = checkpoint.config["rms_norm_eps"]

    @torch.no_grad()
    def log_probabilities(self, windows: torch.Tensor) -> torch.Tensor:
        """Float32 [B, T - 1, V] of token ids [B, T]: of each token but the first."""
        (hidden,), calls = self._skeleton.enter([windows])
        for layer, call in zip(self._layers, calls[len(windows)], strict=True):
            hidden = layer(hidden, *call.args, **call.kwargs)
        hidden = torch.nn.functional.rms_norm(hidden[:, :-1], self._norm.shape, self._norm, self._eps)
        return torch.log_softmax(hidden @ self._head.T, -1)

    def _layer(self, index: int, model: Model, activation: str | None) -> torch.nn.Module:
        layer = self._skeleton.materialise(index)
        for name, linear in self._skeleton.logical_linears(index, layer).items():
            scheme = model.quantization.layer(name)
            if scheme is None:
                continue
            rotation = f"{name}.input_rotation"
            trained = plain(model[rotation]) if rotation in model else None
            linear.rotation = rotation_of(scheme, trained, self._skeleton.device)
            feedback = None if activation else scheme.input_feedback
            rounding = {"activation": activation or scheme.activation, "input_feedback": feedback}
            linear.round_as(scheme.model_copy(update=rounding))
            linear.rounds_input = True
        return layer

    def _parameter(self, model: Model, name: str) -> torch.Tensor:
        return plain(model[name], torch.float32).to(self._skeleton.device)


def score(model: SimulatedModel, base: SimulatedModel, windows: torch.Tensor) -> list[WindowScore]:
    """What each window [T] of ``windows`` [n, T] says of ``model`` beside ``base``."""
    scores = []
    for window in windows:
        found = model.log_probabilities(window[None])[0]
        wanted = base.log_probabilities(window[None])[0]
        targets = window[1:, None].to(found.device)
        divergence = (wanted.exp() * (wanted - found)).sum(-1).double().sum()
        scores.append(
            WindowScore(
                tokens=len(targets),
                loss=-float(found.gather(1, targets).double().sum()),
                loss_base=-float(wanted.gather(1, targets).double().sum()),
                divergence=float(divergence),
                agreed=int((found.argmax(-1) == wanted.argmax(-1)).sum()),
            )
        )
    return scores

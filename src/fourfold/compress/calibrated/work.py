"""LayerWork: one decoder layer as passes see it, with what reaches it on the calibration set."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from fourfold.compress.calibrated.linear import CalibratedLinear
from fourfold.compress.calibrated.recall import Recall
from fourfold.compress.calibrated.routing import ExpertTokens, Routing, survey
from fourfold.compress.calibrated.skeleton import Call
from fourfold.compress.kv_calibration import KVObserver
from fourfold.core.quantization import LayerScheme
from fourfold.formats import BlockTensor

HIDDEN_DTYPE = torch.bfloat16  # of the states kept between layers: what the served model passes on


class AllSeenError(Exception):
    """Ends a run of a layer of which no more is to be seen."""


@dataclass
class LayerWork:
    """A decoder layer in work. Passes change ``module`` in place and put finished weights into ``blocks``.

    ``prefix`` is the layer's name in the checkpoint; ``linears`` are all its linear layers by module name;
    ``schemes`` are those that the recipe rounds. ``inputs`` [B, T, H] come from the quantized layers before
    this one, ``base_inputs`` from the original ones (None when no pass of the recipe asks for them).
    ``calls`` holds the other arguments of the layer by batch size. ``dtypes``, by a parameter's name in
    ``module``, says what it is stored as where it is not rounded to blocks. ``learned`` is what the pass at
    work learned beforehand over the whole model. ``cache``, where there is one, sees keys and values.
    ``kept``, where there is one, gets the original layer's outputs by the id of a batch from ``observe``.
    ``recall``, where there is one, holds products of linear layers.
    """

    index: int
    prefix: str
    config: dict[str, Any]
    module: nn.Module
    linears: dict[str, CalibratedLinear]
    schemes: dict[str, LayerScheme]
    inputs: list[torch.Tensor]
    base_inputs: list[torch.Tensor] | None
    calls: dict[int, Call]
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    learned: dict[str, torch.Tensor] = field(default_factory=dict)
    blocks: dict[str, BlockTensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    routing: Routing = field(default_factory=lambda: Routing({}, [], set()))
    expert_tokens: list[ExpertTokens] = field(default_factory=list)
    cache: KVObserver | None = None
    kept: dict[int, torch.Tensor] | None = None
    recall: Recall | None = None

    @property
    def device(self) -> torch.device:
        """Where the layer's weights are."""
        return next(self.module.parameters()).device

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The layer's output [B, T, H] in float32 for one batch of its inputs."""
        call = self.calls[len(hidden)]
        if self.recall is not None:
            self.recall.batch = id(hidden)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            kwargs = call.kwargs if self.cache is None else call.kwargs | {"past_key_values": self.cache}
            out = self.module(hidden.to(self.device, torch.float32), *call.args, **kwargs)
        return (out[0] if isinstance(out, tuple) else out).float()

    @torch.no_grad()
    def outputs(self, inputs: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """The layer's outputs for ``inputs``, as they are kept between layers."""
        return [self._as_kept(hidden, self.forward(hidden)) for hidden in inputs]

    def base_outputs(self) -> list[torch.Tensor]:
        """The original layer's outputs for ``base_inputs``: ``kept``, or computed while it is itself."""
        assert self.base_inputs is not None
        kept = self.kept or {}
        missing = [hidden for hidden in self.base_inputs if id(hidden) not in kept]
        assert not (missing and self.blocks), "the layer is no longer the original one"
        made = iter(self.outputs(missing))
        return [kept[id(hidden)] if id(hidden) in kept else next(made) for hidden in self.base_inputs]

    def _as_kept(self, hidden: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return output.to(HIDDEN_DTYPE).to(hidden.device)

    @torch.no_grad()
    def observe(
        self,
        names: Iterable[str],
        see: Callable[[str, torch.Tensor], None],
        inputs: Iterable[torch.Tensor] | None = None,
    ) -> None:
        """Run the layer over ``inputs`` (its own by default); ``see(name, x)`` gets the turned input [n, in]
        of each linear layer of ``names``, before rounding. Experts see the tokens of the survey, and starved
        ones more of them. Unless its output is kept, the layer runs no further than the last of ``names``.
        """
        watched = [(name, self.linears[name]) for name in names]
        kept = self.kept if self.kept is not None and not self.blocks else None
        left: set[str] = set()
        keeps = False

        def seen(name: str, x: torch.Tensor) -> None:
            see(name, x)
            left.discard(name)
            if not left and not keeps:
                raise AllSeenError

        for name, linear in watched:
            linear.observer = partial(seen, name)
        try:
            with self.routing.observing(linear for _, linear in watched):
                for hidden in self.inputs if inputs is None else inputs:
                    self.routing.lay_down(hidden)
                    left.update(name for name, _ in watched)
                    keeps = kept is not None and id(hidden) not in kept
                    with suppress(AllSeenError):
                        output = self.forward(hidden)
                        if kept is not None:
                            kept[id(hidden)] = self._as_kept(hidden, output)
        finally:
            for _, linear in watched:
                linear.observer = None

    def start_recalling(self) -> None:
        """From now on products are recalled where they can, from no more bytes than the weights have."""
        self.recall = Recall(sum(linear.weight.nbytes for linear in self.linears.values()))
        for linear in self.linears.values():
            linear.recall = self.recall

    def stop_recalling(self) -> None:
        """From now on every product is computed: learning needs gradients through all of them."""
        self.recall = None
        for linear in self.linears.values():
            linear.recall = None

    def together(self, names: Iterable[str], apart: bool) -> torch.Tensor:
        """The weights of ``names`` below each other, [out, in], with which they compute from now on. With
        ``apart`` the tensors that they computed with so far stay as they are.
        """
        held = {name: self.linears[name].weight for name in names}
        if len(held) == 1 and not apart:
            return next(iter(held.values())).data
        weight = torch.cat([parameter.data for parameter in held.values()])
        for (name, parameter), rows in zip(
            held.items(), weight.split([len(parameter) for parameter in held.values()]), strict=True
        ):
            if not apart:
                self.changed(name)
            parameter.data = rows
        return weight

    def changed(self, name: str) -> None:
        """The weight of the linear layer ``name`` has, or is about to have, other values."""
        self.linears[name].weight_changed()
        if self.recall is not None:
            self.recall.forget(self.linears[name])

    @torch.no_grad()
    def survey_experts(self) -> None:
        """Count the tokens that reach each expert, and lay the routing down for ``observe``. On record are
        experts of which some are rounded.
        """
        surveys, after = survey(self.module, self.inputs, self.forward)
        plans = {experts: one.plans() for experts, one in surveys.items()}
        self.routing = Routing(plans, [self.inputs, self.base_inputs or []], after)
        prefixes = {linear: name.rsplit(".", 2)[0] for name, linear in self.linears.items()}
        rounded = {prefixes[self.linears[name]] for name in self.schemes}
        self.expert_tokens = [
            one.record(name)
            for experts, one in surveys.items()
            if (name := prefixes[next(iter(experts)).up_proj]) in rounded
        ]

    def finish(self, name: str, blocks: BlockTensor, values: torch.Tensor | None = None) -> None:
        """``blocks`` is the final weight of the linear layer ``name``, which computes with it from now on.
        ``values`` is the same in float32, where it is at hand.
        """
        self.blocks[name] = blocks
        held = self.linears[name].weight.data
        values = blocks.dequantize() if values is None else values
        if values.data_ptr() != held.data_ptr():
            held.copy_(values)
        self.changed(name)

    def round_rest(self, round_weight: Callable[[str, torch.Tensor, LayerScheme], BlockTensor]) -> None:
        """Round what no pass has finished."""
        for name, scheme in self.schemes.items():
            if name not in self.blocks:
                self.finish(name, round_weight(f"{name}.weight", self.linears[name].weight, scheme))

    def serve(self) -> None:
        """From now on inputs are rounded as the served model rounds them."""
        for name in self.schemes:
            self.linears[name].rounds_input = True

"""The loop over decoder layers: materialise, run the passes, make durable, hand the outputs on.

At any time one layer is in memory, and the hidden states between two layers: tokens x hidden size x 2 bytes,
twice when a pass compares with the original model. What a finished layer hands on is computed from the very
values that were made durable, so that a run which is resumed gives the same bytes as one that was not. When
memory ends inside a layer, that layer is begun again with batches of half the size.

Where the recipe says ``inputs: original``, each layer gets what the original model's layers before it give;
then layers do not wait for each other, and others may make them (``make`` with ``original_states``).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from fourfold.checkpoint.dialect import module_of
from fourfold.checkpoint.kv_scales import SCALED
from fourfold.compress.calibrated.experts import SeparateExperts
from fourfold.compress.calibrated.linear import CalibratedLinear
from fourfold.compress.calibrated.memory import is_out_of_memory, no_room, release
from fourfold.compress.calibrated.names import Source
from fourfold.compress.calibrated.rotation import rotation_of
from fourfold.compress.calibrated.routing import ExpertTokens, summarise
from fourfold.compress.calibrated.skeleton import Call, Skeleton
from fourfold.compress.calibrated.store import FinishedLayer, LayerStore
from fourfold.compress.calibrated.whole import WholeModel
from fourfold.compress.calibrated.work import HIDDEN_DTYPE, LayerWork
from fourfold.compress.calibration import CalibrationSet
from fourfold.compress.kv_calibration import KVObserver
from fourfold.compress.model import Model, Value, plain
from fourfold.compress.passes.rtn import round_to_nearest
from fourfold.compress.pipeline import Change, Pass, Tell, get_pass, options_of, silent
from fourfold.compress.recipe import Recipe
from fourfold.compress.resolve import every_such
from fourfold.core.errors import FourfoldError
from fourfold.core.records import Record

LayerProgress = Callable[[int, int, str], None]
"""Called as ``progress(done, layers, what)``, also before the first layer and whenever time is to be counted
anew.
"""

Result = TypeVar("Result")

KV_AMAX = "largest keys and values"
TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 16384}


class LayerLoop:
    """Runs the calibrated passes of ``recipe`` over ``model`` (prepared by them, unrounded)."""

    def __init__(
        self,
        model: Model,
        recipe: Recipe,
        calibration: CalibrationSet,
        store: LayerStore,
        device: torch.device,
    ):
        self.model, self.recipe, self.calibration, self.store = model, recipe, calibration, store
        self.passes = [(get_pass(use.name), options_of(use, recipe.name)) for use in recipe.uses]
        self.skeleton = Skeleton(model, device)
        self.original = recipe.inputs == "original"
        self.needs_base = self.original or any(p.needs_base(options) for p, options in self.passes)
        self.notes = self._left_out()
        self.experts: list[ExpertTokens] = []
        self.kv = KVObserver()
        self.tell: Tell = silent
        self._learned: dict[str, dict[str, torch.Tensor]] = {}
        self._inputs: list[torch.Tensor] = []
        self._base_inputs: list[torch.Tensor] | None = None
        self._calls: dict[int, list[Call]] = {}

    def run(self, progress: LayerProgress | None = None) -> dict[str, Callable[[], Value]]:
        """Finish every layer; returns how to load each finished tensor.

        ``progress`` is told where the work begins, before and after what is done already is gone through.
        """
        count, tell = len(self.skeleton), progress or (lambda *_: None)
        finished = {i: found for i in range(count) if (found := self.store.find(key_of(i))) is not None}
        if len(finished) < count:
            first = min(index for index in range(count) if index not in finished)
            tell(first, count, self.skeleton.prefix(first))
            self.start()
            for index in range(count):
                if index == first:
                    tell(first, count, self.skeleton.prefix(first))
                finished[index] = self.step(index)
                if index >= first:
                    tell(index + 1, count, self.skeleton.prefix(index))
        made: dict[str, Callable[[], Value]] = {}
        for index, layer in sorted(finished.items()):
            self.notes += layer.notes
            load = partial(self.store.load, key_of(index))
            tensors = {name: partial(load, name, held) for name, held in layer.tensors.items()}
            if (amax := tensors.pop(KV_AMAX, None)) is not None:
                self.kv.amax[index] = plain(amax(), torch.float32)
            made |= tensors
            self.experts += layer.experts
        self.notes += summarise(self.experts)
        return made

    def learn(self) -> None:
        """Learn what passes learn over the whole model, or take it from the store."""
        for place, (chosen, options) in enumerate(self.passes):
            if chosen.learn is not None:
                change = partial(self.change, self.passes[:place])
                self._learned[chosen.name] = self._learn(chosen, options, change)

    @torch.no_grad()
    def start(self) -> None:
        """Learn what passes learn over the whole model, and compute the first layer's inputs."""
        self.learn()
        batches = self.calibration.batches(TOKENS_PER_BATCH[self.skeleton.device.type])
        inputs, self._calls = self.skeleton.enter(batches)
        self._inputs = [hidden.to(HIDDEN_DTYPE) for hidden in inputs]
        self._base_inputs = list(self._inputs) if self.needs_base else None

    def part_from_base(self) -> None:
        """Hold the original model's states apart from the quantized one's, as from the second layer on."""
        if self._base_inputs is not None and not self.original:
            self._base_inputs = [hidden.clone() for hidden in self._base_inputs]

    def step(self, index: int) -> FinishedLayer:
        """Finish layer ``index``, whose inputs are at hand, and compute the inputs of the next, if any.

        Raises FourfoldError when memory does not suffice for a single sequence.
        """
        return self._in_memory(self._step, index)

    def make(self, index: int, states: list[torch.Tensor]) -> None:
        """Finish layer ``index``, which the original model's ``states`` reach, and go no further."""
        self._receive(states, list(states))
        self._in_memory(self._make, index)

    @torch.no_grad()
    def original_states(self, last: int) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """What reaches each layer up to ``last`` in the original model, [B, T, H] each."""
        self.start()
        for index in range(last + 1):
            yield index, self._inputs
            if index < last:
                self._in_memory(self._pass_on, index)

    def _in_memory(self, do: "Callable[[int], Result]", index: int) -> "Result":
        """``do(index)``, in smaller batches as long as memory does not suffice."""
        while True:
            try:
                return do(index)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error)
            # out here nothing refers to what was in memory when it ended
            release(self.skeleton.device)
            self._halve_batches(index, reason)

    def _make(self, index: int) -> FinishedLayer:
        return self._finish(self.begin(index))

    def _pass_on(self, index: int) -> None:
        self._inputs = self.begin(index).outputs(self._inputs)
        self._base_inputs = list(self._inputs)

    def _finish(self, work: LayerWork) -> FinishedLayer:
        finished = self.store.find(key_of(work.index))
        if finished is None:
            self.run_passes(work)
            values = self.values(work)
            values |= self._largest_kv(work, values)
            finished = self.store.save(key_of(work.index), values, work.notes, work.expert_tokens)
        return finished

    @torch.no_grad()
    def _largest_kv(self, work: LayerWork, values: dict[str, Value]) -> dict[str, Value]:
        """What the finished layer puts into its KV cache at most, where the cache has scales to calibrate."""
        if self.model.quantization.kv_cache not in SCALED:
            return {}
        self.restore(work, values)
        work.cache = KVObserver()
        for hidden in work.inputs:
            work.forward(hidden)
        found, work.cache = work.cache.amax, None
        return {KV_AMAX: found[work.index]} if work.index in found else {}

    def _step(self, index: int) -> FinishedLayer:
        work = self.begin(index)
        is_last = index + 1 == len(self.skeleton)
        wanted = work.base_inputs is not None and not is_last
        if wanted and self._passes_show_base(work):
            work.kept = {}
        base_outputs = work.base_outputs() if wanted and work.kept is None else None
        finished = self._finish(work)
        if work.kept is not None:
            base_outputs = work.base_outputs()
        if self.original and base_outputs is not None:
            self._inputs, self._base_inputs = base_outputs, list(base_outputs)
        elif not is_last:
            held = {f"{name}.weight" for name in work.blocks}
            self.restore(work, self.store.load_all(key_of(index), finished, held))
            self._inputs, self._base_inputs = work.outputs(work.inputs), base_outputs
        return finished

    def _passes_show_base(self, work: LayerWork) -> bool:
        """Whether the passes themselves run the original layer. With experts they run it in part."""
        layers = [(chosen, options) for chosen, options in self.passes if chosen.layer is not None]
        if len(layers) != 1 or any(isinstance(module, SeparateExperts) for module in work.module.modules()):
            return False
        chosen, options = layers[0]
        return chosen.shows_base and chosen.needs_base(options)

    def _halve_batches(self, index: int, reason: str) -> None:
        size = max(map(len, self._inputs))
        if size == 1:
            device = self.skeleton.device
            where = f"the memory of {device}, even one sequence at a time"
            raise no_room(f"Layer {self.skeleton.prefix(index)} does not fit into {where}", device, reason)
        half = (size + 1) // 2

        def split(states: list[torch.Tensor]) -> list[torch.Tensor]:
            return [part for hidden in states for part in hidden.split(half)]

        self._receive(split(self._inputs), None if self._base_inputs is None else split(self._base_inputs))

    def _receive(self, inputs: list[torch.Tensor], base_inputs: list[torch.Tensor] | None) -> None:
        self._inputs, self._base_inputs = inputs, base_inputs
        sizes = sorted({len(hidden) for hidden in inputs})
        if not set(sizes) <= self._calls.keys():
            _, self._calls = self.skeleton.enter(self.calibration.token_ids[:count] for count in sizes)

    def begin(self, index: int) -> LayerWork:
        """Layer ``index`` with its original weights. Raises FourfoldError naming one that is not finite."""
        return self._work(index, self.skeleton.materialise(index))

    def _work(self, index: int, module: nn.Module) -> LayerWork:
        linears = self.skeleton.logical_linears(index, module)
        layers = self.model.quantization.layers
        schemes = {name: layers[name] for name in linears if name in layers}
        for name, scheme in schemes.items():
            linears[name].round_as(scheme)
        return LayerWork(
            index=index,
            prefix=self.skeleton.prefix(index),
            config=self.model.config,
            module=module,
            linears=linears,
            schemes=schemes,
            inputs=self._inputs,
            base_inputs=self._base_inputs,
            calls={size: calls[index] for size, calls in self._calls.items()},
            dtypes=self._stored_dtypes(index, module),
        )

    def run_passes(self, work: LayerWork) -> None:
        """The recipe's passes on one layer; what none of them rounds is rounded to nearest."""
        if any(chosen.layer is not None for chosen, _ in self.passes):
            work.survey_experts()
        self._run(self.passes, work)
        work.round_rest(round_to_nearest)

    def _run(self, passes: Sequence[tuple[Pass, Record]], work: LayerWork) -> None:
        for chosen, options in passes:
            if chosen.layer is not None:
                work.learned = self._learned.get(chosen.name, {})
                chosen.layer(work, options)

    @torch.no_grad()
    def change(self, passes: Sequence[tuple[Pass, Record]], model: WholeModel) -> None:
        """Let ``passes``, which do not round, change ``model`` as they will change every layer by itself."""
        inputs, self._calls = self.skeleton.enter([self.calibration.token_ids[:1]])
        self._inputs, self._base_inputs = [hidden.to(HIDDEN_DTYPE) for hidden in inputs], None
        for index, layer in enumerate(model.layers):
            work = self._work(index, layer)
            outputs = work.outputs(self._inputs)
            self._run(passes, work)
            self._inputs = outputs

    def values(self, work: LayerWork) -> dict[str, Value]:
        """The finished tensors of the layer, as the checkpoint will hold them."""
        found: dict[str, Value] = {f"{name}.weight": blocks for name, blocks in work.blocks.items()}
        for source, parameter in self._unfinished(work):
            info = self.model.entries[source.stored].info
            assert info.dtype is not None, "quantized sources were refused"
            shape = info.shape if source.piece is None else source.piece.shape
            value = parameter.detach().to("cpu", info.dtype).view(shape)
            scheme = self.model.quantization.layer(module_of(source.name))
            # a router, which transformers holds in no linear layer
            found[source.name] = value if scheme is None else round_to_nearest(source.name, value, scheme)
        for name, linear in work.linears.items():
            scheme = work.schemes.get(name)
            if scheme is not None and scheme.input_transform == "trained" and linear.rotation is not None:
                found[f"{name}.input_rotation"] = linear.rotation.to("cpu", torch.float32)
        return self.skeleton.names.assemble(found)

    def restore(self, work: LayerWork, values: dict[str, Value]) -> None:
        """Give ``work`` the finished tensors, and let it compute as the served model will. What it rounded
        itself has the values of its blocks already.
        """
        for source, parameter in self._unfinished(work):
            parameter.data.copy_(source.take(values[source.stored]).view(parameter.shape))
        for name in work.linears.keys() - work.blocks.keys():
            work.changed(name)
        for name, scheme in work.schemes.items():
            linear: CalibratedLinear = work.linears[name]
            linear.rotation = rotation_of(scheme, values.get(f"{name}.input_rotation"), work.device)
            linear.rounds_input = True

    def expert_record(self) -> dict[str, Any]:
        """For the manifest, by the name of a layer's experts: how many tokens the router sent to each, and
        which of them stayed starved.
        """
        tokens = {layer.experts: layer.tokens for layer in self.experts}
        starved = {layer.experts: layer.still_starved for layer in self.experts if layer.still_starved}
        return {k: v for k, v in {"expert_tokens": tokens, "starved_experts": starved}.items() if v}

    def _left_out(self) -> list[str]:
        """A note on rounded weights that no linear layer of transformers' decoder holds, such as those of
        routers and of multi-token prediction. Raises FourfoldError when they were to be rotated.
        """
        held = self.skeleton.linear_weights()
        layers = self.model.quantization.layers
        names = [name for name in layers if f"{name}.weight" not in held]
        for name in names:
            if layers[name].input_transform is not None:
                raise FourfoldError(
                    f"{name} is to be rotated, but transformers builds no linear layer that holds it, so "
                    f"nothing can run it. Add a `keep` entry '{every_such(name)}' to the recipe."
                )
        if not names:
            return []
        more = ", …" if len(names) > 3 else ""
        return [
            f"{len(names)} weights are in no linear layer of the decoder that transformers builds, and were "
            f"rounded to nearest without calibration: {', '.join(names[:3])}{more}."
        ]

    def _stored_dtypes(self, index: int, module: nn.Module) -> dict[str, torch.dtype]:
        inside, names = self.skeleton.inside(index), self.skeleton.names
        infos = {n: self.model.entries[names[inside + n].stored].info for n, _ in module.named_parameters()}
        return {name: info.dtype for name, info in infos.items() if info.dtype is not None}

    def _parameters(self, work: LayerWork) -> list[tuple[Source, torch.Tensor]]:
        inside, names = self.skeleton.inside(work.index), self.skeleton.names
        return [(names[inside + name], parameter) for name, parameter in work.module.named_parameters()]

    def _unfinished(self, work: LayerWork) -> list[tuple[Source, torch.Tensor]]:
        """The parameters that no pass of this run has rounded."""
        finished = {f"{name}.weight" for name in work.blocks}
        return [(source, held) for source, held in self._parameters(work) if source.name not in finished]

    def _learn(self, chosen: Pass, options: Record, change: Change) -> dict[str, torch.Tensor]:
        found = self.store.find(chosen.name)
        if found is None:
            assert chosen.learn is not None
            with torch.enable_grad():
                learned = chosen.learn(self.skeleton, self.calibration, options, change, self.tell)
            found = self.store.save(chosen.name, {n: t.detach().cpu() for n, t in learned.items()}, [])
        return {
            n: v for n, v in self.store.load_all(chosen.name, found).items() if isinstance(v, torch.Tensor)
        }


def key_of(index: int) -> str:
    """The name of a layer's files in the store."""
    return f"layer-{index:05d}"

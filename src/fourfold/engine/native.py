"""A decoder as one C++ program: a step is one call without the GIL, and Python only says what it is about.

``obstacle`` says which piece of a model cannot be said in the program's operations; such a model is left to
torch. ``compile`` reads and packs the weights of others one by one, letting go of each as it is packed, so
that no more than one is ever held twice; those in the packed cache are not read at all. States are float32
between the linear layers, whose inputs are rounded to int8 in blocks of 32 (arithmetic ``int8``) or to
bfloat16 (``exact``), after the checkpoint's own scheme has turned and rounded them; int8 takes the place of
other 8-bit formats. Matrices without blocks become bfloat16, whatever the checkpoint has; norms, biases and
routers stay float32. A result depends neither on what is beside it in the batch nor on the threads.
"""

from array import array
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from fourfold.engine.decoder import Decoder, Layer
from fourfold.engine.experts import MixtureOfExperts
from fourfold.engine.kv_cache import KVCache
from fourfold.engine.kv_format import AsComputed, Fp8, KVFormat
from fourfold.engine.layers import FusedLinear, Linear, RMSNorm
from fourfold.engine.packed_cache import PackedCache
from fourfold.engine.requests import EngineConfig
from fourfold.engine.scheduler import Chunk
from fourfold.engine.weights import same_rotation
from fourfold.formats import BlockTensor
from fourfold.kernels import Weight, native_available, native_problem
from fourfold.kernels.cpu.packed import TILE_ROWS, PackedWeight
from fourfold.kernels.cpu.program import Buffer, Gate, InputScheme, Mixture, Norm, Program
from fourfold.kernels.expanded import exact_in_bfloat16

BLOCK = 32
HEAD_ROWS = 64  # of a whole sequence whose logits are computed at a time
PACKED_FORMATS = ("mxfp4", "mxint8")
NEAR_INT8 = (None, "mxfp8-e4m3", "mxfp8-e5m2")  # what int8 takes the place of
KV_TYPES = {torch.bfloat16: "bf16", torch.float32: "f32", torch.uint8: "fp8"}


class NativeDecoder:
    """A recorded model. Sequences' tokens go in, logits of the chosen rows or their largest come out."""

    def __init__(
        self, model: Decoder, form: KVFormat, arithmetic: str, config: EngineConfig, cache: PackedCache | None
    ):
        shape = model.shape
        self.arithmetic, self.form, self.block_size = arithmetic, form, config.kv_block_size
        self.asked = config.arithmetic
        self.layers, self.kv_heads = shape.layers, shape.kv_heads
        self._cache: KVCache | None = None
        widest = max(shape.hidden, shape.intermediate, shape.heads * shape.head_dim)
        self.program = Program(config.max_batch_tokens, shape.vocabulary, widest)
        self.hidden = self.program.buffer(shape.hidden)
        self.marks: list[int] = []  # where each layer begins, and the head
        self.packed_bytes = 0
        _Recording(self, model, cache).record()
        # numpy's views: torch takes as long for slices as a small model for half a layer
        self._logits = self.program.logits.data.numpy()[:, : shape.vocabulary]
        self._largest = self.program.tokens.numpy()[0]

    def use(self, cache: KVCache) -> None:
        """Keys and values go to ``cache`` and come from there from now on."""
        if cache is self._cache:
            return
        self._cache, data = cache, cache.data
        self.program.native.use_cache(data.flatten(1), data.shape[1], data.shape[2])

    def step(self, cache: KVCache, chunks: list[Chunk], chosen: list[int]) -> tuple[np.ndarray, list[int]]:
        """Run a step over ``cache``: logits [n, V] of the ``chosen`` rows and the places of their largest.

        The logits are there until the next step.
        """
        self.use(cache)
        tokens, spans = array("i"), array("i")
        for chunk in chunks:
            tokens.fromlist(chunk.token_ids)
            spans.extend((chunk.count, chunk.start, len(chunk.sequence.table.blocks)))
        tables = b"".join([chunk.sequence.table.blocks for chunk in chunks])
        self.program.run(tokens, spans, tables, array("i", chosen))
        return self._logits[: len(chosen)], self._largest[: len(chosen)].tolist()

    def embedded(self, token_ids: list[int]) -> np.ndarray:
        """States [T, H] before the first layer."""
        return self._states(token_ids, None, 0, 1)

    def through(self, hidden: np.ndarray, first: int, end: int) -> np.ndarray:
        """States [T, H] of a whole sequence from before layer ``first`` to before layer ``end``."""
        return self._states([0] * len(hidden), hidden, self.marks[first], self.marks[end])

    def logits_of(self, hidden: np.ndarray) -> np.ndarray:
        """Logits [T, V] of states [T, H] that have passed every layer."""
        result = np.empty((len(hidden), self.program.logits.columns), dtype=np.float32)
        for start in range(0, len(hidden), self.program.rows):
            rows = slice(start, start + self.program.rows)
            self._load(hidden[rows])
            self._head(result[rows])
        return result

    def logits(self, token_ids: list[int]) -> np.ndarray:
        """Logits [T, V] of a whole sequence, beside the cache that is in use."""
        result = np.empty((len(token_ids), self.program.logits.columns), dtype=np.float32)
        for rows in self._pass(token_ids, None, 0, self.marks[-1]):
            self._head(result[rows])
        return result

    def _states(self, token_ids: list[int], hidden: np.ndarray | None, first: int, end: int) -> np.ndarray:
        result = np.empty((len(token_ids), self.hidden.columns), dtype=np.float32)
        for rows in self._pass(token_ids, hidden, first, end):
            result[rows] = self.hidden.first(len(result[rows])).numpy()
        return result

    def _pass(self, token_ids: list[int], hidden: np.ndarray | None, first: int, end: int) -> Iterator[slice]:
        """Operations ``first`` to ``end`` - 1 over a whole sequence, in as many steps as it takes.

        After each step the rows are told whose states are there; ``hidden`` are states to begin with.
        """
        blocks = -(-len(token_ids) // self.block_size)
        self.use(KVCache(self.layers, blocks, self.block_size, self.kv_heads, self.form))
        tables = array("i", range(blocks))
        for start in range(0, len(token_ids), self.program.rows):
            rows = slice(start, start + self.program.rows)
            tokens = array("i", token_ids[rows])
            spans = array("i", (len(tokens), start, blocks))
            if hidden is not None:
                self._load(hidden[rows])
                self.program.run(tokens, spans, tables, first=1, end=self.marks[0])
            self.program.run(tokens, spans, tables, array("i", range(len(tokens))), first, end)
            yield rows

    def _load(self, hidden: np.ndarray) -> None:
        self.hidden.first(len(hidden)).copy_(torch.from_numpy(hidden))

    def _head(self, out: np.ndarray) -> None:
        """Logits ``out`` [n, V] of the first n states."""
        for start in range(0, len(out), HEAD_ROWS):
            count = min(HEAD_ROWS, len(out) - start)
            self.hidden.first(count).copy_(self.hidden.first(start + count)[start:])
            blocks = -(-count // self.block_size)
            tokens, tables = array("i", bytes(4 * count)), array("i", bytes(4 * blocks))
            spans, chosen = array("i", (count, 0, blocks)), array("i", range(count))
            self.program.run(tokens, spans, tables, chosen, first=self.marks[-1])
            out[start : start + count] = self.program.logits.first(count).numpy()


class _Recording:
    """Writes a decoder's operations down, packing its weights on the way."""

    def __init__(self, target: NativeDecoder, model: Decoder, cache: PackedCache | None):
        self.cache = cache
        self.target, self.model, self.program = target, model, target.program
        self.shape, self.x, self.arithmetic = model.shape, target.hidden, target.arithmetic
        shape = self.shape
        self.qkv = self.program.buffer((shape.heads + 2 * shape.kv_heads) * shape.head_dim)
        self.attended = self.program.buffer(shape.heads * shape.head_dim, close=True)
        self.gated = self.program.buffer(shape.intermediate)
        self.gate_up: Buffer | None = None  # made where they are needed
        self.added: Buffer | None = None
        self.angles = [self.program.buffer(shape.head_dim) for _ in model.rotaries]

    def record(self) -> None:
        model, program = self.model, self.program
        arithmetic, scheme = self.arithmetic_of(model.head), self.scheme(model.head)
        table = None if model.tied else model.embedding
        head = self.pack(model.head)
        program.embed(head if table is None else table, model.embedding_scale, self.x)
        for rotary, angles in zip(model.rotaries, self.angles, strict=True):
            program.angles(rotary.speeds, rotary.length, angles)
        for index, layer in enumerate(model.layers):
            self.target.marks.append(len(program))
            self.attention(layer, index)
            self.mlp(layer)
        self.target.marks.append(len(program))
        program.prepared(self.x, {arithmetic}, norm_of(model.norm), scheme)
        program.head(head, arithmetic, model.logit_softcap or 0.0)

    def attention(self, layer: Layer, index: int) -> None:
        shape, attention, program = self.shape, layer.attention, self.program
        self.linear(attention.qkv, self.x, self.qkv, norm_of(layer.attention_norm))
        form, scoring = self.target.form, attention.scoring
        kind, scales = KV_TYPES[form.stored_dtype], None
        if isinstance(form, Fp8) and form.scales is not None:
            scales = program.row(form.scales[index])
        heads = (shape.heads, shape.kv_heads, shape.head_dim)
        norm, floor = attention.qk_norm, shape.eps * shape.head_dim
        if norm is not None:
            norm = program.keep((norm.float() * shape.head_dim**0.5).contiguous())
        sinks = None if scoring.sinks is None else program.row(scoring.sinks)
        native, angles = program.native, self.angles[attention.rotary]
        native.heads(self.qkv.data, *heads, angles.data, norm, floor, index, kind, scales)
        if index == shape.layers - 1:  # of rows whose logits nobody wants, keys and values are enough
            program.choose(self.x, self.qkv._replace(columns=shape.heads * shape.head_dim))
        native.attention(
            self.qkv.data, *heads, self.attended.data, index, kind, scales,
            scoring.scale, scoring.softcap or 0.0, scoring.window or 0, sinks, shape.max_positions,
        )  # fmt: skip
        self.add(attention.output, self.attended, layer.attention_post_norm)

    def mlp(self, layer: Layer) -> None:
        mlp, program = layer.mlp, self.program
        if isinstance(mlp, MixtureOfExperts):
            return self.mixture(layer, mlp)
        gate = Gate(mlp.gating.kind, mlp.gating.alpha, mlp.gating.limit)
        norm = norm_of(layer.mlp_norm)
        if isinstance(mlp.gate_up, Linear) and self.gated.columns % TILE_ROWS == 0:
            arithmetic = self.prepare([mlp.gate_up], self.x, norm)[0]
            if self.gated.columns % BLOCK == 0:
                taken, scheme = self.arithmetic_of(mlp.down), self.scheme(mlp.down)
                program.gated_input(self.pack(mlp.gate_up), arithmetic, gate, taken, scheme)
                return self.add(mlp.down, None, layer.mlp_post_norm)
            program.gated_linear(self.pack(mlp.gate_up), arithmetic, gate, self.gated)
        else:
            self.gate_up = self.gate_up or program.buffer(2 * self.gated.columns)
            self.linear(mlp.gate_up, self.x, self.gate_up, norm)
            program.gated(self.gate_up, gate, self.gated)
        self.add(mlp.down, self.gated, layer.mlp_post_norm)

    def mixture(self, layer: Layer, mlp: MixtureOfExperts) -> None:
        first = mlp.experts[0]
        gating, width = first.gating, first.down.shape[1]
        both = parts_of(first.gate_up)[0], first.down
        arithmetic = self.arithmetic_of(both[0]), self.arithmetic_of(both[1])
        schemes = self.scheme(both[0]), self.scheme(both[1])
        router = mlp.router.weight
        assert isinstance(router, Tensor)
        mixture = Mixture(
            norm_of(layer.mlp_norm), router, mlp.router.bias,
            [self.pack(part) for expert in mlp.experts for part in parts_of(expert.gate_up)],
            [self.pack(expert.down) for expert in mlp.experts],
            width, mlp.top_k, mlp.among_chosen,
            Gate(gating.kind, gating.alpha, gating.limit), arithmetic, schemes,
        )  # fmt: skip
        if layer.mlp_post_norm is None:
            return self.program.mixture(self.x, mixture, self.x, accumulate=True)
        self.added = self.added or self.program.buffer(self.shape.hidden)
        self.program.mixture(self.x, mixture, self.added, accumulate=False)
        self.program.add_normed(self.added, norm_of(layer.mlp_post_norm), self.x)

    def add(self, linear: Linear, x: Buffer | None, norm: RMSNorm | None) -> None:
        """What ``linear`` makes of ``x``, or of what is prepared, is added to the states, perhaps normed."""
        if norm is None:
            return self.linear(linear, x, self.x, accumulate=True)
        self.added = self.added or self.program.buffer(self.shape.hidden)
        self.linear(linear, x, self.added)
        self.program.add_normed(self.added, norm_of(norm), self.x)

    def linear(
        self,
        linear: Linear | FusedLinear,
        x: Buffer | None,
        out: Buffer,
        norm: Norm | None = None,
        accumulate: bool = False,
    ) -> None:
        """``out`` = (or +=) what ``linear`` makes of ``x``, perhaps normed, or of what is prepared."""
        column = 0
        for _, alike in groupby(parts_of(linear), lambda part: (id(part.rotation), part.activation)):
            parts = list(alike)
            for part, arithmetic in zip(parts, self.prepare(parts, x, norm), strict=True):
                packed = self.pack(part)
                self.program.linear(packed, arithmetic, out, column, accumulate)
                column += packed.n

    def prepare(self, parts: Seq[Linear], x: Buffer | None, norm: Norm | None) -> list[str]:
        """``x``, perhaps normed, as ``parts``, whose scheme is one, take it. Returns their arithmetics."""
        arithmetics = [self.arithmetic_of(part) for part in parts]
        if x is not None:
            self.program.prepared(x, arithmetics, norm, self.scheme(parts[0]))
        return arithmetics

    def pack(self, linear: Linear) -> PackedWeight:
        """The packed weight of ``linear``, whose own is let go."""
        name = linear.name
        packed = self.cache.get(name) if self.cache is not None and name is not None else None
        if packed is None:
            # rows of several layers are packed where they lie: put together first, they would be held twice
            pieces = linear.pieces if whole_tiles(linear.pieces) else (linear,)
            packed = PackedWeight.pack_rows([bfloat16_unless(in_blocks(p), p.weight) for p in pieces])
            if self.cache is not None and name is not None:
                self.cache.put(name, packed)
        linear.weight = torch.empty(0)
        self.target.packed_bytes += packed.data.nbytes
        return packed if linear.bias is None else replace(packed, bias=linear.bias.float().contiguous())

    def arithmetic_of(self, linear: Linear) -> str:
        """Of a layer that is not packed yet. Unless asked for, int8 moves no value of 4 or 6 bits."""
        near = linear.activation in NEAR_INT8 or InputScheme(None, linear.activation).fits_int8
        moved = not near and self.target.asked == "auto"
        return "exact" if moved or not in_blocks(linear) else self.arithmetic

    def scheme(self, linear: Linear) -> InputScheme:
        """What becomes of the inputs of ``linear`` before its arithmetic rounds them."""
        near = self.arithmetic == "int8" and linear.activation in NEAR_INT8
        return InputScheme(linear.rotation, None if near else linear.activation)


def compile(
    model: Decoder, form: KVFormat, config: EngineConfig, cache: PackedCache | None = None
) -> NativeDecoder:
    """``model``, which has no ``obstacle``, as a program, its weights packed and its tensors gone.

    ``form`` is how the KV caches that it will use are held. Weights that ``cache`` has are not even read.
    """
    arithmetic = "exact" if config.arithmetic == "exact" else "int8"
    return NativeDecoder(model, form, arithmetic, config, cache)


def obstacle(model: Decoder, form: KVFormat, config: EngineConfig) -> str | None:
    """What of ``model`` the program has no words for, or None."""
    if not native_available():
        return f"the C++ extension cannot be used ({native_problem()})"
    if model.dtype != torch.bfloat16 and config.arithmetic != "int8":
        return f"the model is to be computed in {str(model.dtype).removeprefix('torch.')}"
    if not isinstance(form, AsComputed | Fp8):
        return f"the KV cache is held in {form.name}"
    if model.shape.head_dim % 16:
        return f"heads of {model.shape.head_dim} features are no multiple of 16"
    for layer in model.layers:
        mlp = layer.mlp
        linears = [layer.attention.qkv, layer.attention.output]
        if isinstance(mlp, MixtureOfExperts):
            if problem := mixture_obstacle(mlp):
                return problem
            linears += [linear for expert in mlp.experts for linear in (expert.gate_up, expert.down)]
        else:
            linears += [mlp.gate_up, mlp.down]
        for part in (part for linear in linears for part in parts_of(linear)):
            if problem := linear_obstacle(part):
                return problem
    if model.head.format is not None and not exact_in_bfloat16(model.head.format):
        return f"the head is in {model.head.format}"
    return inputs_obstacle(model.head)


def mixture_obstacle(mixture: MixtureOfExperts) -> str | None:
    """Why the experts cannot be computed together, or None."""
    if mixture.router.format is not None:
        return "the router is quantized"
    kinds = {
        part.format
        for expert in mixture.experts
        for linear in (expert.gate_up, expert.down)
        for part in parts_of(linear)
    }
    fused = all(isinstance(expert.gate_up, Linear) for expert in mixture.experts)
    if len(kinds) > 1 or not fused:
        return "experts are in different formats"
    first = mixture.experts[0]
    for expert in mixture.experts[1:]:
        for one, other in ((first.gate_up, expert.gate_up), (first.down, expert.down)):
            if not same_inputs(parts_of(one)[0], parts_of(other)[0]):
                return "experts turn or round their inputs in different ways"
    width = mixture.experts[0].down.shape[1]
    return f"experts are {width} wide, no multiple of {TILE_ROWS}" if width % TILE_ROWS else None


def linear_obstacle(linear: Linear) -> str | None:
    """Why ``linear`` cannot be computed, or None."""
    if linear.format is not None and not in_blocks(linear):
        return f"weights are in {linear.format}"
    return inputs_obstacle(linear)


def inputs_obstacle(linear: Linear) -> str | None:
    """Why the inputs of ``linear`` cannot be what they must, or None."""
    if linear.activation is not None and not exact_in_bfloat16(linear.activation):
        return f"inputs are rounded to {linear.activation}"
    return "inputs are rounded with feedback" if linear.feedback else None


def in_blocks(linear: Linear) -> bool:
    """Whether the program holds the weight in blocks too; others become bfloat16."""
    return linear.format in PACKED_FORMATS


def same_inputs(one: Linear, other: Linear) -> bool:
    """Whether both make the same of their inputs."""
    return one.activation == other.activation and same_rotation([one, other])


def whole_tiles(pieces: Seq[Linear]) -> bool:
    """Whether each of ``pieces`` but the last ends where a tile of a packed weight does."""
    return not any(piece.shape[0] % TILE_ROWS for piece in pieces[:-1])


def bfloat16_unless(in_blocks: bool, weight: Weight) -> Tensor | BlockTensor:
    """``weight``, dequantized unless it may stay in blocks."""
    assert not isinstance(weight, PackedWeight), "only torch's path holds packed weights"
    if in_blocks or isinstance(weight, Tensor):
        return weight
    return weight.dequantize(torch.bfloat16)


def norm_of(norm: RMSNorm) -> Norm:
    """``norm`` as programs take it."""
    return norm.weight, float(norm.floor) ** 2


def parts_of(linear: Linear | FusedLinear) -> Seq[Linear]:
    """The layers that ``linear`` is made of."""
    return linear.parts if isinstance(linear, FusedLinear) else (linear,)

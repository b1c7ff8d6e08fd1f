"""From a decoder in memory to a C++ program's operations, its weights packed on the way.

Weights are read and packed one by one, and each is let go as it is packed, so that no more than one is ever
held twice; those in the packed cache are not read at all. Matrices without blocks become bfloat16, whatever
the checkpoint has; norms, biases and routers stay float32.
"""

from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from fourfold.engine.decoder import Decoder, Layer
from fourfold.engine.experts import MixtureOfExperts
from fourfold.engine.kv_format import Fp8, KVFormat
from fourfold.engine.layers import FusedLinear, Linear, RMSNorm
from fourfold.engine.obstacles import in_blocks
from fourfold.engine.packed_cache import PackedCache
from fourfold.engine.requests import EngineConfig
from fourfold.formats import BlockTensor
from fourfold.kernels import Weight
from fourfold.kernels.cpu.packed import TILE_ROWS, PackedWeight
from fourfold.kernels.cpu.program import Buffer, Gate, InputScheme, Mixture, Norm, Program

BLOCK = 32
NEAR_INT8 = (None, "mxfp8-e4m3", "mxfp8-e5m2")  # what int8 takes the place of
KV_TYPES = {torch.bfloat16: "bf16", torch.float32: "f32", torch.uint8: "fp8"}


class Recording:
    """Writes a decoder's operations down. ``marks``: where each layer begins, and the head."""

    def __init__(self, model: Decoder, form: KVFormat, config: EngineConfig, cache: PackedCache | None):
        self.model, self.form, self.cache = model, form, cache
        self.asked, self.arithmetic = config.arithmetic, "exact" if config.arithmetic == "exact" else "int8"
        self.shape = shape = model.shape
        widest = max(shape.hidden, shape.intermediate, shape.heads * shape.head_dim)
        self.program = program = Program(config.max_batch_tokens, shape.vocabulary, widest)
        self.marks: list[int] = []
        self.packed_bytes = 0
        self.x = program.buffer(shape.hidden)
        self.qkv = program.buffer((shape.heads + 2 * shape.kv_heads) * shape.head_dim)
        self.attended = program.buffer(shape.heads * shape.head_dim, close=True)
        self.gated = program.buffer(shape.intermediate)
        self.gate_up: Buffer | None = None  # made where they are needed
        self.added: Buffer | None = None
        self.angles = [program.buffer(shape.head_dim) for _ in model.rotaries]

    def record(self) -> None:
        """The whole model: tokens to logits."""
        model, program = self.model, self.program
        arithmetic, scheme = self.arithmetic_of(model.head), self.scheme(model.head)
        table = None if model.tied else model.embedding
        head = self.pack(model.head)
        program.embed(head if table is None else table, model.embedding_scale, self.x)
        for rotary, angles in zip(model.rotaries, self.angles, strict=True):
            program.angles(rotary.speeds, rotary.length, angles)
        for index, layer in enumerate(model.layers):
            self.marks.append(len(program))
            self.attention(layer, index)
            self.mlp(layer)
        self.marks.append(len(program))
        program.prepared(self.x, {arithmetic}, norm_of(model.norm), scheme)
        program.head(head, arithmetic, model.logit_softcap or 0.0)

    def attention(self, layer: Layer, index: int) -> None:
        """The first half of ``layer``, the model's ``index``-th: x += attention(norm(x))."""
        shape, attention, program = self.shape, layer.attention, self.program
        self.linear(attention.qkv, self.x, self.qkv, norm_of(layer.attention_norm))
        form, scoring = self.form, attention.scoring
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
        """The second half of ``layer``: x += mlp(norm(x)), in the fewest operations that its sizes allow."""
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
        """The second half of a ``layer`` of experts, which are all of one kind."""
        first = mlp.experts[0]
        gating, gate_up, down = first.gating, first.gate_up.parts[0], first.down
        width = down.shape[1]
        arithmetic = self.arithmetic_of(gate_up), self.arithmetic_of(down)
        schemes = self.scheme(gate_up), self.scheme(down)
        router = mlp.router.weight
        assert isinstance(router, Tensor)
        mixture = Mixture(
            norm_of(layer.mlp_norm), router, mlp.router.bias,
            [self.pack(part) for expert in mlp.experts for part in expert.gate_up.parts],
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
        for _, alike in groupby(linear.parts, lambda part: (id(part.rotation), part.activation)):
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
        self.packed_bytes += packed.data.nbytes
        return packed if linear.bias is None else replace(packed, bias=linear.bias.float().contiguous())

    def arithmetic_of(self, linear: Linear) -> str:
        """Of a layer that is not packed yet. Unless asked for, int8 moves no value of 4 or 6 bits."""
        near = linear.activation in NEAR_INT8 or InputScheme(None, linear.activation).fits_int8
        moved = not near and self.asked == "auto"
        return "exact" if moved or not in_blocks(linear) else self.arithmetic

    def scheme(self, linear: Linear) -> InputScheme:
        """What becomes of the inputs of ``linear`` before its arithmetic rounds them."""
        near = self.arithmetic == "int8" and linear.activation in NEAR_INT8
        return InputScheme(linear.rotation, None if near else linear.activation)


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

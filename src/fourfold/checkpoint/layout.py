"""How the parts of a BlockTensor lie on disk: names, dtypes and shapes, for one format in one dialect.

Every dialect stores the same bytes under other names and dtypes: E4M3 codes as F8_E4M3 or U8, eight int4
codes in an I32. So a layout only names, views and reshapes; two ecosystems differ beyond that in one thing
each, told by a flag: compressed-tensors stores int4 as offset binary (``code + 8``), and NVFP4's global scale
as a divisor.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fourfold.checkpoint.dialect import Entry
from fourfold.checkpoint.storage.header import PlannedTensor, StoredTensor, broken, short
from fourfold.checkpoint.tensors import TensorInfo
from fourfold.core.errors import FourfoldError
from fourfold.core.quantization import LayerScheme
from fourfold.formats import BlockTensor, get_format

Load = Callable[[StoredTensor], torch.Tensor]
BLOCKS, SCALES, GLOBAL, SHAPE = "blocks", "scales", "global_scale", "shape"
FLOAT_SCALES = (torch.float32, torch.bfloat16, torch.float16)
OFFSET_BINARY = 0x88


@dataclass(frozen=True)
class Field:
    """One stored tensor of a weight: suffix after the module's name, dtype, number of dimensions.

    ``ndim`` None means that of the logical tensor; 0 or 1 flattens a tensor of scales.
    """

    suffix: str
    dtype: torch.dtype
    ndim: int | None = None


@dataclass(frozen=True)
class Layout:
    """The stored tensors of one format."""

    blocks: Field
    scales: Field
    global_scale: Field | None = None
    shape: Field | None = None
    offset_binary: bool = False

    def fields(self) -> dict[str, Field]:
        """Every stored part in the order it is planned."""
        parts = {BLOCKS: self.blocks, SCALES: self.scales, GLOBAL: self.global_scale, SHAPE: self.shape}
        return {part: field for part, field in parts.items() if field is not None}

    @property
    def suffixes(self) -> set[str]:
        """Those of every stored part."""
        return {field.suffix for field in self.fields().values()}


def plan_blocks(info: TensorInfo, module: str, layout: Layout) -> list[PlannedTensor]:
    """What is stored for the quantized tensor ``info`` of ``module``."""
    assert info.format is not None
    shapes = get_format(info.format).empty_shapes(info.shape)
    planned = []
    for part, field in layout.fields().items():
        shape: tuple[int, ...]
        if part == SHAPE:
            shape = (len(info.shape),)
        elif part == GLOBAL:
            shape = (1,)
        else:
            shape = _stored_shape(*shapes[part], field)
        planned.append(PlannedTensor(f"{module}.{field.suffix}", field.dtype, shape))
    return planned


def store_blocks(value: BlockTensor, layout: Layout, planned: list[PlannedTensor]) -> list[torch.Tensor]:
    """The stored tensors of ``value``, in the order of the plan; views wherever the bytes are the same."""
    blocks = value.blocks ^ OFFSET_BINARY if layout.offset_binary else value.blocks
    parts = {
        BLOCKS: blocks,
        SCALES: value.scales,
        GLOBAL: None if value.global_scale is None else 1 / value.global_scale.float(),
        SHAPE: torch.tensor(value.shape, dtype=torch.int64),
    }
    stored = []
    for part, plan in zip(layout.fields(), planned, strict=True):
        tensor = parts[part]
        assert tensor is not None
        if plan.dtype != tensor.dtype:
            tensor = tensor.contiguous().view(plan.dtype)
        stored.append(tensor.reshape(plan.shape))
    return stored


def block_entry(module: str, scheme: LayerScheme, layout: Layout, stored: dict[str, StoredTensor]) -> Entry:
    """The weight of ``module``. Raises FourfoldError when a part is missing or does not fit the others."""
    parts: dict[str, StoredTensor] = {}
    for part, field in layout.fields().items():
        name = f"{module}.{field.suffix}"
        if name not in stored:
            raise FourfoldError(
                f"'{short(module)}' is said to be held in {scheme.weight}, but '{short(name)}' is not among "
                "the tensors. The folder is incomplete, or its config.json belongs to another one: fetch "
                "both again."
            )
        parts[part] = stored[name]
    return Entry(_check(module, scheme.weight, layout, parts), parts, scheme.scale_rule)


def assemble_blocks(entry: Entry, layout: Layout, load: Load) -> BlockTensor:
    """Read the quantized tensor of ``entry``."""
    info = entry.info
    assert info.format is not None
    shapes = get_format(info.format).empty_shapes(info.shape)
    blocks = load(entry.parts[BLOCKS]).view(torch.uint8).reshape(shapes[BLOCKS][0])
    if layout.offset_binary:
        blocks ^= OFFSET_BINARY
    scale_shape, scale_dtype = shapes[SCALES]
    scales = exactly(load(entry.parts[SCALES]), scale_dtype, entry.parts[SCALES]).reshape(scale_shape)
    whole = None
    if GLOBAL in entry.parts:
        whole = 1 / load(entry.parts[GLOBAL]).float().reshape(())
    return BlockTensor(info.format, blocks, scales, entry.scale_rule, whole)


def exactly(tensor: torch.Tensor, dtype: torch.dtype, stored: StoredTensor) -> torch.Tensor:
    """``tensor`` as ``dtype``: bytes are viewed, floats converted.

    Raises FourfoldError when that changes a number.
    """
    if dtype == torch.uint8:
        return tensor.view(torch.uint8)
    converted = tensor.to(dtype)
    if not torch.equal(converted.to(tensor.dtype), tensor):
        raise FourfoldError(
            f"The scales '{short(stored.name)}' in {stored.path} are {tensor.dtype} and do not fit {dtype} "
            "without change. Start from the unquantized model."
        )
    return converted


def _stored_shape(shape: torch.Size, dtype: torch.dtype, field: Field) -> tuple[int, ...]:
    if field.ndim == 0:
        return ()
    if field.ndim == 1:
        return (shape.numel(),)
    ratio = field.dtype.itemsize // dtype.itemsize
    return (*shape[:-1], shape[-1] // ratio)


def _check(module: str, format_name: str, layout: Layout, parts: dict[str, StoredTensor]) -> TensorInfo:
    blocks, scales = parts[BLOCKS], parts[SCALES]
    form = get_format(format_name)
    _check_dtype(blocks, (layout.blocks.dtype,), format_name)
    _check_dtype(
        scales, FLOAT_SCALES if form.scale in ("fp16", "fp32") else (layout.scales.dtype,), format_name
    )
    if len(blocks.shape) < 2:
        raise broken(
            blocks.path, f"'{short(blocks.name)}' has the shape {list(blocks.shape)}, not that of a weight"
        )
    width = blocks.shape[-1] * blocks.dtype.itemsize * 8 // form.element.bits
    shape = (*blocks.shape[:-1], width)
    expected = math.prod(form.empty_shapes(shape)[SCALES][0])
    if math.prod(scales.shape) != expected:
        raise broken(
            scales.path,
            f"'{short(scales.name)}' of shape {list(scales.shape)} cannot be the {expected} {format_name} "
            f"scales of a weight of shape {list(shape)}",
        )
    nbytes = sum(part.nbytes for part in parts.values())
    return TensorInfo(f"{module}.weight", shape, None, format_name, nbytes, blocks.path.name)


def _check_dtype(stored: StoredTensor, allowed: tuple[torch.dtype, ...], format_name: str) -> None:
    if stored.dtype not in allowed:
        names = " or ".join(str(dtype) for dtype in allowed)
        raise broken(
            stored.path, f"'{short(stored.name)}' is {stored.dtype}, but {format_name} is stored as {names}"
        )

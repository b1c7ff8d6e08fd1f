"""GPTQ's rounding of a weight's columns in C++, to an MX format of floats.

``cpp/column_rounding.h`` says what it computes; :mod:`fourfold.compress.calibrated.column_rounding` does the
same in torch, for every format and device. Here 16 rows go side by side through registers and the first
cache, where torch makes eleven calls for each column.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.formats import BlockFormat, BlockTensor, ScaleRule
from fourfold.formats.numbers.scale import smallest_fraction_added
from fourfold.kernels.cpu import native

BLOCK = 32
MOST_COLUMNS = 128  # in one call

Element = tuple[int, int, int, int, float, int]


@dataclass(frozen=True)
class ColumnRounding:
    """``turned`` float32 [in, out], a weight's columns in some order, becomes what it is rounded to under
    ``scales`` uint8 [in / 32, out]. ``places`` and ``blocks`` int64 [1, in]: where a column of the weight
    lies, and of which block one of ``turned`` is.
    """

    turned: Tensor
    places: Tensor
    blocks: Tensor
    scales: Tensor
    block_format: BlockFormat
    rule: ScaleRule
    rules: Element
    results: Tensor

    @classmethod
    def of(
        cls,
        weight: Tensor,
        order: Tensor,
        importance: Tensor,
        block_format: BlockFormat,
        rule: str | None,
        search: bool,
    ) -> "ColumnRounding | None":
        """The columns of ``weight`` [out, in] in ``order`` int64 [in]. Scales are by ``rule``; ``search``
        tries their neighbours, and each column's error counts with its ``importance`` float32 [in]. None for
        what takes torch: another device or layout, other formats.
        """
        here = native is not None and weight.device.type == "cpu"
        plain = weight.dtype == torch.float32 and weight.is_contiguous() and weight.numel() > 0
        floats = block_format.scale == "e8m0" and not block_format.element.is_integer
        chosen = ScaleRule(rule) if rule else block_format.default_rule
        if not (here and plain and floats) or chosen in (None, ScaleRule.MSE):
            return None
        assert native is not None
        out, width = weight.shape
        turned, places = weight.new_empty(width, out), order.argsort()[None]
        scales = torch.empty(width // BLOCK, out, dtype=torch.uint8)
        rules = element_rules(block_format, chosen)
        weights = importance[None].contiguous()
        native.turn_columns(weight, places, weights, turned, scales, rules, search, alone())
        results = turned.new_empty(2, min(MOST_COLUMNS, width), out)
        return cls(turned, places, order[None] // BLOCK, scales, block_format, chosen, rules, results)

    def round(
        self, columns: slice, factor: Tensor, pull: Tensor | None, pending: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Round ``columns`` of ``turned``. ``factor``, ``pull`` [b, b] and ``pending`` [b, out] are those of
        the feedback's block. Returns the errors w - q and what the columns were before they were rounded,
        [b, out] each, until the next call.
        """
        errors, before = self.results[:, : len(factor)].unbind()
        diagonal = factor.diagonal()
        tall = None if pull is None else (pull.T / diagonal[:, None]).contiguous()
        pending = None if pending is None else pending.contiguous()
        matrices = (reach_of(factor), tall, diagonal[None].contiguous(), pending, errors, before)
        blocks = self.blocks[:, columns].contiguous()
        assert native is not None
        native.round_columns(self.turned[columns], self.scales, blocks, *matrices, self.rules, alone())
        return errors, before

    def put(self, weight: Tensor) -> BlockTensor:
        """Write what was rounded into ``weight`` float32 [out, in], and give it in the format."""
        layout = self.block_format.empty_shapes(weight.shape).values()
        codes, held = (torch.empty(shape, dtype=dtype) for shape, dtype in layout)
        assert native is not None
        native.put_columns(self.turned, self.places, self.scales, weight, codes, held, self.rules, alone())
        return BlockTensor(self.block_format.name, codes, held, self.rule.value, None)


def reach_of(factor: Tensor) -> Tensor:
    """F [b, b] as C++ reads it, of R: row k divided by R_kk."""
    return (factor.T / factor.diagonal()[:, None]).contiguous()


def element_rules(block_format: BlockFormat, rule: ScaleRule) -> Element:
    """What C++ needs to know of an element and of its scales."""
    element = block_format.element
    exponents = (element.min_exponent, element.max_exponent)
    added_from = smallest_fraction_added(element, rule)
    return (element.bits, element.mantissa_bits, *exponents, element.max, added_from)


def alone() -> bool:
    """Whether to do without the pool's threads."""
    return torch.get_num_threads() == 1

"""What ``fourfold formats`` prints: the formats side by side, on named distributions and on a checkpoint.

SQNR is ``10 log10(sum x^2 / sum (x - x')^2)`` in dB over all values together, ``x'`` being what ``x`` reads
back as. The distributions are drawn with a fixed seed, so that the figures repeat; those with heavy tails
hang on the few largest samples, and so on the number of samples, more than the others do. Formats whose scale
spans a row see rows of 4096 values.

MXFP4 and INT4 with groups of 64 both take 4.25 bits a value. Which one is nearer depends on the tails: a
float grid is finer near zero and coarser near the largest value of a block.
"""

import math
from collections.abc import Iterable

import torch
from pydantic import Field

from fourfold.core.records import Record
from fourfold.formats.numbers.block import BlockFormat
from fourfold.formats.numbers.registry import format_names, get_format

SEED = 20240601
SAMPLE_SHAPE = (256, 4096)
RIVALS = ("mxfp4", "int4-g64")


class FormatRow(Record):
    """One format. Ranges are those of single values, the smallest and the largest scale included."""

    name: str
    element: str
    block_size: int | None = Field(description="values that share a scale; None for a whole row or tensor")
    scale: str
    scale_rule: str | None
    bits_per_value: float
    smallest_positive: float
    largest: float
    block_range: float = Field(description="largest / smallest positive value under one scale")
    sqnr_db: dict[str, float] = Field(description="distribution -> dB")
    checkpoint_sqnr_db: float | None = Field(
        None, description="over the tensors it can hold; None without noise"
    )
    checkpoint_tensors: int = 0


class CheckpointSurvey(Record):
    """MXFP4 and INT4-g64 tensor by tensor, where both can hold it: how often each has the smaller error."""

    tensors: int
    values: int
    skipped: int = Field(description="tensors that are no float matrices, or hold NaN or Inf")
    nearer: dict[str, int] = Field(description="format -> tensors with the smaller squared error")
    equal: int


class FormatSurvey(Record):
    """The result of ``fourfold formats``."""

    kind: str = "fourfold.formats/1"
    seed: int
    samples: int
    formats: list[FormatRow]
    checkpoint: CheckpointSurvey | None = None


class Tally:
    """Signal and noise of every format over the tensors seen so far."""

    def __init__(self, formats: list[BlockFormat]):
        self.formats = formats
        self.signal = {f.name: 0.0 for f in formats}
        self.noise = {f.name: 0.0 for f in formats}
        self.held = {f.name: 0 for f in formats}
        self.nearer: dict[str, int] = dict.fromkeys(RIVALS, 0)
        self.tensors = self.values = self.skipped = self.equal = 0

    def add(self, x: torch.Tensor) -> None:
        """Count one tensor, or skip it: vectors, integers, what holds NaN or Inf."""
        if x.ndim < 2 or not x.is_floating_point() or not x.numel() or not bool(x.isfinite().all()):
            self.skipped += 1
            return
        self.tensors, self.values = self.tensors + 1, self.values + x.numel()
        errors: dict[str, float] = {}
        for fmt in self.formats:
            if x.shape[-1] % (fmt.block_size or 1) == 0:
                signal, errors[fmt.name] = fmt.signal_and_noise(x)
                self.signal[fmt.name] += signal
                self.noise[fmt.name] += errors[fmt.name]
                self.held[fmt.name] += 1
        if all(name in errors for name in RIVALS):
            self._compare(errors)

    def _compare(self, errors: dict[str, float]) -> None:
        first, second = RIVALS
        if errors[first] == errors[second]:
            self.equal += 1
        else:
            self.nearer[first if errors[first] < errors[second] else second] += 1

    def sqnr_db(self, name: str) -> float | None:
        """The format's SQNR over all that was added; None where there was no noise or nothing."""
        if not self.noise[name] or not self.signal[name]:
            return None
        return 10 * math.log10(self.signal[name] / self.noise[name])


def survey(tensors: Iterable[tuple[str, torch.Tensor]] | None = None) -> FormatSurvey:
    """All formats on the named distributions and, when given, on ``tensors`` (name, values) of a checkpoint.

    Tensors are taken one at a time and not kept. Vectors, integer tensors and tensors with NaN or Inf are
    skipped and counted. Raises FourfoldError when a tensor cannot be read as bfloat16, float16 or float32.
    """
    formats = [get_format(name) for name in format_names()]
    by_distribution = {name: _tally(formats, [x]) for name, x in distributions().items()}
    own = None if tensors is None else _tally(formats, (x for _, x in tensors))
    rows = [_row(fmt, by_distribution, own) for fmt in sorted(formats, key=lambda f: f.bits_per_value)]
    checkpoint = own and CheckpointSurvey(
        tensors=own.tensors, values=own.values, skipped=own.skipped, nearer=own.nearer, equal=own.equal
    )
    return FormatSurvey(seed=SEED, samples=math.prod(SAMPLE_SHAPE), formats=rows, checkpoint=checkpoint)


def distributions() -> dict[str, torch.Tensor]:
    """Float32 samples [256, 4096] of unit scale: name -> values."""
    generator = torch.Generator().manual_seed(SEED)

    def normal() -> torch.Tensor:
        return torch.randn(SAMPLE_SHAPE, generator=generator)

    def uniform() -> torch.Tensor:
        return torch.rand(SAMPLE_SHAPE, generator=generator)

    laplace = (1 - uniform()).log_() - (1 - uniform()).log_()
    chi_squared = normal().square_() + normal().square_() + normal().square_()
    return {
        "gaussian": normal(),
        "laplace": laplace,
        "student-t3": normal() / (chi_squared / 3).sqrt_(),
        "gaussian, 1% x20": normal() * torch.where(uniform() < 0.01, 20.0, 1.0),
    }


def _tally(formats: list[BlockFormat], tensors: Iterable[torch.Tensor]) -> Tally:
    tally = Tally(formats)
    for x in tensors:
        tally.add(x)
    return tally


def _row(fmt: BlockFormat, by_distribution: dict[str, Tally], own: Tally | None) -> FormatRow:
    smallest, largest = fmt.value_range
    figures = {name: tally.sqnr_db(fmt.name) for name, tally in by_distribution.items()}
    return FormatRow(
        name=fmt.name,
        element=fmt.element.name,
        block_size=fmt.block_size,
        scale=fmt.scale,
        scale_rule=fmt.default_rule,
        bits_per_value=fmt.bits_per_value,
        smallest_positive=smallest,
        largest=largest,
        block_range=fmt.element.max / fmt.element.min,
        sqnr_db={name: db for name, db in figures.items() if db is not None},
        checkpoint_sqnr_db=own and own.sqnr_db(fmt.name),
        checkpoint_tensors=own.held[fmt.name] if own else 0,
    )

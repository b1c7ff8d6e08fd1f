"""The formats by name; in a module of its own so that a BlockTensor can find its format."""

from functools import cache
from typing import TYPE_CHECKING

from fourfold.core.registry import Registry

if TYPE_CHECKING:
    from fourfold.formats.numbers.block import BlockFormat

FORMATS = Registry("fourfold.formats", "FORMAT", "format")


def format_names() -> list[str]:
    """All format names, sorted."""
    return FORMATS.names()


@cache  # listing a package walks its folder, and every BlockTensor asks for its format
def get_format(name: str) -> "BlockFormat":
    """The format called ``name``. Raises UsageError, listing the names, when there is none."""
    return FORMATS.get(name)

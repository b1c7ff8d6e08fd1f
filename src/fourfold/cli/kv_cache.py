"""The option --kv-cache, which serve, generate and evaluate share."""

from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from fourfold.core.errors import UsageError
from fourfold.core.quantization import KVCacheFormat

if TYPE_CHECKING:
    from fourfold.engine.requests import KVCacheChoice

CHOICES = ("auto", "none", *get_args(KVCacheFormat))

KVCacheOption = Annotated[
    str | None,
    typer.Option(
        "--kv-cache",
        metavar="FORMAT",
        help=f"How keys and values are held: {', '.join(CHOICES)}. auto, the default, is as the checkpoint "
        "says; none is not quantized.",
    ),
]


def check_kv_cache(name: str | None) -> "KVCacheChoice":
    """``name``, or auto. Raises UsageError that lists what there is."""
    if name is not None and name not in CHOICES:
        raise UsageError(f"There is no KV cache format '{name}'. Choose one of: {', '.join(CHOICES)}.")
    return cast("KVCacheChoice", name or "auto")

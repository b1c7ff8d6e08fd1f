"""The option --kv-cache, which serve, generate and evaluate share."""

from typing import TYPE_CHECKING, Annotated

import typer

from fourfold.core.errors import UsageError

if TYPE_CHECKING:
    from fourfold.engine.requests import KVCacheChoice

KVCacheOption = Annotated[
    str | None,
    typer.Option(
        "--kv-cache",
        metavar="FORMAT",
        help="How keys and values are held: none (not quantized), fp8, fp8-head, mxfp8-e4m3 or mxfp4. "
        "[default: as the checkpoint says]",
    ),
]


def check_kv_cache(name: str | None) -> "KVCacheChoice":
    """``name``, or auto. Raises UsageError that lists what there is."""
    from typing import get_args

    from fourfold.engine.requests import KVCacheChoice

    for choice in get_args(KVCacheChoice):
        if choice == (name or "auto"):
            return choice
    raise UsageError(
        f"There is no KV cache format '{name}'. Choose one of: {', '.join(get_args(KVCacheChoice))}."
    )

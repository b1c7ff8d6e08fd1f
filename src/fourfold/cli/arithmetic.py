"""The option --arithmetic, which serve, generate and evaluate share."""

from typing import Annotated, Literal

import typer

ArithmeticOption = Annotated[
    Literal["auto", "int8", "exact"] | None,
    typer.Option(
        help="Of linear layers: int8 rounds their inputs in blocks of 32, exact does not; auto is int8 where "
        "the checkpoint leaves inputs as they are or rounds them to 8 bits. What a checkpoint in float16 or "
        "float32 did not quantize becomes bfloat16, with exact float32. [default: auto]"
    ),
]

"""The option --arithmetic, which serve, generate and evaluate share."""

from typing import Annotated, Literal

import typer

ArithmeticOption = Annotated[
    Literal["auto", "int8", "exact"] | None,
    typer.Option(
        help="Of linear layers: int8 rounds their inputs in blocks of 32, exact does not; auto is int8, "
        "unless the checkpoint rounds inputs to fewer bits and int8 would move them (mxfp6-e3m2). What a "
        "float16 or float32 checkpoint did not quantize becomes bfloat16, with exact float32. [default: auto]"
    ),
]

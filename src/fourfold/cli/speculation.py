"""``--speculative-tokens``, shared by the commands that run a model."""

from typing import Annotated

import typer

ALONE = 8  # tokens: for one sequence at a time a step's other rows cost little; see docs/performance.md

SpeculativeTokensOption = Annotated[
    int, typer.Option(min=0, help="Longest draft, looked up in the text so far, tried in one step; 0: none.")
]

"""The options of ``fourfold evaluate``, and which of its two kinds of task each is for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from fourfold.core.errors import UsageError

Model = Annotated[
    str, typer.Argument(help="Model folder, GGUF file or hub name; a server's URL for humaneval and lm-eval.")
]
TaskName = Annotated[
    str,
    typer.Option("--task", metavar="TASK", help="heldout, longcontext, humaneval or lm-eval:NAME,NAME..."),
]
Against = Annotated[
    str | None, typer.Option(metavar="BASE", help="The model it was made from, to compare with.")
]
Text = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="Text to judge on instead of the package's own; may be repeated."),
]
GateOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="METRIC=LIMIT",
        help="Exit with 1 when the value is worse than the limit: perplexity, perplexity_ratio, "
        "kl_divergence, tail_loss, tail_loss_increase (at most), top1_agreement (at least), or a score's "
        "name such as pass@1 (at least). May be repeated.",
    ),
]
WindowTokens = Annotated[
    int | None,
    typer.Option(help="Tokens the model reads at a time. [default: 512; longcontext: as many as it takes]"),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens-per-text",
        min=0,
        help="Tokens taken of each text, spread through it; 0 takes all. [default: 4096; longcontext: all]",
    ),
]
Layers = Annotated[
    bool, typer.Option("--layers", help="Show too what every layer and every linear adds; needs --against.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; as many as cores by default.")]
Json = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures here.")]
Questions = Annotated[
    int | None, typer.Option(min=1, help="humaneval, lm-eval: only the first so many questions.")
]
Samples = Annotated[int | None, typer.Option(min=1, help="humaneval: answers to each problem. [default: 1]")]
Chat = Annotated[bool, typer.Option("--chat", help="humaneval: ask in a chat, for models trained to answer.")]
Temperature = Annotated[
    float | None, typer.Option(min=0, help="humaneval: of sampling. [default: 0 for one answer, else 0.8]")
]
AnswerTokens = Annotated[
    int | None, typer.Option("--max-tokens", min=1, help="humaneval, lm-eval: of an answer. [default: 512]")
]
Seed = Annotated[int | None, typer.Option(help="humaneval, lm-eval: of sampling. [default: 0]")]
Concurrency = Annotated[
    int | None, typer.Option(min=1, help="humaneval, lm-eval: questions at a time. [default: 8]")
]
Tokenizer = Annotated[
    str | None, typer.Option(help="lm-eval: folder with the served model's tokenizer. [default: the model's]")
]
Include = Annotated[
    Path | None, typer.Option(metavar="DIR", help="lm-eval: folder with further task files (YAML).")
]
ServedModel = Annotated[
    str | None, typer.Option("--model-name", help="Which of a server's models. [default: the first]")
]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key-env", help="Environment variable that holds the server's API key."),
]


def refuse(task: str, given: Mapping[str, object], why: str) -> None:
    """Raise UsageError when any option of ``given`` (name -> value, None or False is absent) was given."""
    for name, value in given.items():
        if value is not None and value is not False and value != []:
            raise UsageError(f"--{name.replace('_', '-')} does not go with the task '{task}': {why}.")

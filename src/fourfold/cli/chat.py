"""``fourfold chat``: the terminal around a conversation."""

import contextlib
import sys
import unicodedata
from typing import TYPE_CHECKING, Annotated

import typer

from fourfold.cli.speculation import ALONE
from fourfold.core.imports import importing

if TYPE_CHECKING:
    from rich.console import Console

    from fourfold.server.local import Chat

HELP = "/reset forgets the conversation, /exit ends it, Ctrl-C stops an answer."


def chat(
    model: Annotated[str, typer.Argument(help="A model folder, a GGUF file, a hub name, or a server's URL.")],
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.7,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1, help="Keep the likeliest tokens up to this sum.")
    ] = 0.95,
    seed: Annotated[int | None, typer.Option(help="Equal seeds give equal answers.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: one per core.")] = None,
) -> None:
    """Talk with a model in the terminal.

    Example: `fourfold chat ./SmolLM2-mxfp4` or `fourfold chat http://127.0.0.1:8000`
    """
    from rich.console import Console
    from rich.markup import escape

    options = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
    options |= {"seed": seed} if seed is not None else {}
    partner = open_chat(model, options, threads)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold]{escape(partner.name)}[/bold]. {HELP}")
    converse(partner, console, [{"role": "system", "content": system}] if system else [])


def open_chat(model: str, options: dict[str, float], threads: int | None) -> "Chat":
    """The server at a URL, or an engine in this process."""
    if model.startswith(("http://", "https://")):
        from fourfold.server.remote import RemoteChat

        return RemoteChat(model, options)
    with importing():
        from fourfold.engine import Engine, EngineConfig, SamplingParams
        from fourfold.server.local import LocalChat

    return LocalChat(
        Engine.load(model, EngineConfig(threads=threads, max_batch_size=1, speculative_tokens=ALONE)),
        SamplingParams.model_validate(options),
    )


def converse(partner: "Chat", console: "Console", beginning: list[dict[str, str]]) -> None:
    """Turn by turn until /exit or the end of input."""
    messages = list(beginning)
    while (line := read_line()) is not None and line != "/exit":
        if line == "/reset":
            messages = list(beginning)
            console.print("The conversation is forgotten.")
        elif line.startswith("/"):
            console.print(HELP)
        elif line:
            messages = take_turn(partner, console, [*messages, {"role": "user", "content": line}])


def read_line() -> str | None:
    """What the person says; None at the end of input. A prompt is shown only to a terminal."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 -- gives input() its line editing and history
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:  # meant for an answer that had just ended, or to drop the line
        typer.echo()
        return ""


def take_turn(partner: "Chat", console: "Console", messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Print the answer as it comes; returns the conversation with it. An answer cut short stays in it."""
    from fourfold.core.errors import FourfoldError

    answer = ""
    try:
        for piece in partner.reply(messages):
            answer += piece
            console.print(printable(piece), end="", markup=False)
    except KeyboardInterrupt:
        console.print(" [dim](stopped)[/dim]", end="")
    except FourfoldError as error:
        if not sys.stdin.isatty():
            raise
        console.print(str(error), style="red", markup=False)
        return messages[:-1]
    console.print()
    return [*messages, {"role": "assistant", "content": answer}]


def printable(text: str) -> str:
    """A model's text must not steer the terminal: control characters but newline and tab are dropped."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")

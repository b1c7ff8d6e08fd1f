"""The ``fourfold`` command: registers the verbs and turns errors into one paragraph and an exit code.

0 is good, 1 is failed (or a gate not kept), 2 is misused, 130 is interrupted by Ctrl-C, as shells have it.
Verb modules import their rooms inside the function, so that ``fourfold --help`` starts at once.
"""

import atexit
import gc
import signal
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from importlib import import_module

import typer

from fourfold import __version__
from fourfold.core.durable import file_failure
from fourfold.core.errors import FourfoldError
from fourfold.core.imports import SPINS, SPINS_BETWEEN_SMALL_PARTS, patience

VERBS = (
    "quantize",
    "convert",
    "verify",
    "evaluate",
    "generate",
    "chat",
    "serve",
    "bench",
    "report",
    "formats",
    "doctor",
)

INTERRUPTED = 130

app = typer.Typer(
    help="Take a Hugging Face LLM to MXFP4, prove that it is still good, serve it, measure it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
)


def show_version(wanted: bool) -> None:
    """``--version``: print and stop."""
    if wanted:
        typer.echo(f"fourfold {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", callback=show_version, is_eager=True, help="Print it."),
) -> None:
    """Options that belong to no verb."""
    patience(SPINS_BETWEEN_SMALL_PARTS if context.invoked_subcommand == "quantize" else SPINS)


def interruptible(verb: Callable[..., None]) -> Callable[..., None]:
    """``verb`` with Ctrl-C as exit code 130; what typer makes of it differs between its versions."""

    @wraps(verb)
    def run(*arguments: object, **options: object) -> None:
        try:
            verb(*arguments, **options)
        except KeyboardInterrupt:
            # what was only half made when it came (an event loop, a coroutine) would complain as it goes
            sys.unraisablehook = lambda _: None
            warnings.simplefilter("ignore")
            raise typer.Exit(INTERRUPTED) from None

    return run


for verb in VERBS:
    app.command(verb)(interruptible(getattr(import_module(f"fourfold.cli.{verb}"), verb)))


def main() -> None:
    """Run the command line; never a traceback for a FourfoldError, a failing disk, or Ctrl-C."""
    gc.freeze()  # so that what is imported from here on is frozen too: see fourfold.core.imports
    try:
        app()
    except FourfoldError as error:
        print(f"fourfold: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        # the last net: rooms name the place where they know it better than the system does
        print(f"fourfold: {file_failure(error)}", file=sys.stderr)
        sys.exit(1)
    finally:
        # registered last, so run first: libraries that tidy up at exit would answer Ctrl-C with a traceback
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)

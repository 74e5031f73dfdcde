"""The command line: one module per command; each parses, calls one service and renders what it returns."""

from __future__ import annotations

import gc
import os
import sys
from typing import Annotated, Any

# typer and the config models run pydantic; other packages' pydantic plugins have no business in here, and
# looking for them reads the metadata of everything installed
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

import typer

from galore_mem.errors import InputError

# every misuse of the command line (a missing value, an unknown option) derives from this class
USAGE_ERROR: Any = typer.BadParameter.__base__

app = typer.Typer(
    name="galore-mem",
    help="How much memory a training run needs, with which method, at which moment, and why.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        from galore_mem import __version__

        typer.echo(f"galore-mem {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """How much memory a training run needs, with which method, at which moment, and why."""


def _register() -> None:
    from galore_mem.cli import estimate, methods, models, papers, schema, simulate, verify

    app.command("estimate")(estimate.command)
    app.command("methods")(methods.command)
    app.command("models")(models.command)
    app.command("papers")(papers.command)
    app.command("schema")(schema.command)
    app.command("simulate")(simulate.command)
    app.add_typer(verify.app, name="verify")


_register()


def main() -> None:
    """Entry point: 0 done, 1 done but the answer is no, 2 the input or usage is wrong (one line on stderr),
    130 interrupted."""
    gc.disable()  # a command is short; what it makes is freed by reference counts
    try:
        code = app(standalone_mode=False)
    except InputError as error:
        code = _fail(str(error))
    except USAGE_ERROR as error:
        message = error.format_message()
        code = _fail(f"{message} (see galore-mem --help)") if message else 0  # no arguments: help has been shown
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    gc.freeze()  # nor is there anything to look for on the way out
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2

"""The command `eightgig`: its subcommands, its exit codes, and where every error ends.

Exit codes: 0 done, 1 a fault of eightgig, 2 something the user can mend, 3 a guard stopped the
run, 130 interrupted.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import eightgig
from eightgig.cli import commands, render
from eightgig.errors import EightgigError

FAULT = 1
INTERRUPTED = 130


def make_app() -> typer.Typer:
    """The command with all its subcommands."""
    app = typer.Typer(
        name="eightgig",
        help=eightgig.__doc__,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for name, command in commands.ALL.items():
        app.command(name)(command)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `eightgig` with `arguments` (those of the process where None).

    Returns:
        The exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Rows and answers hold any character; a terminal may know less.
            stream.reconfigure(errors="backslashreplace")
    # bitsandbytes asks for a package that eightgig has no use for, on processors with bfloat16.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_no_request_for_kernels)
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        make_app()(args=words, prog_name="eightgig")
    except SystemExit as end:  # how typer ends, also when all went well
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the one place where nothing is let through
        if _was_interrupted(error):
            return INTERRUPTED
        if isinstance(error, EightgigError):
            render.show_error(error, as_json="--json" in words)
            return error.exit_code
        render.show_fault()
        return FAULT
    return 0


def _was_interrupted(error: BaseException) -> bool:
    """Whether Ctrl-C led to `error`: until 3.12 Python wraps it where a class is being made, which
    the import of a large library does for seconds.
    """
    cause = error.__cause__
    return cause is not None and (isinstance(cause, KeyboardInterrupt) or _was_interrupted(cause))


def _is_no_request_for_kernels(record: logging.LogRecord) -> bool:
    return "kernels-community" not in record.getMessage()


def _show_version(value: bool) -> None:
    if value:
        render.show_line(f"eightgig {eightgig.__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            metavar="",
            callback=_show_version,
            is_eager=True,
            help="Show the version and exit.",
        ),
    ] = False,
) -> None:
    """What is given before the name of a subcommand."""

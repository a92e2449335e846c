"""The ``liveptycho`` command: its subcommands, and what becomes of errors."""

from __future__ import annotations

import logging
import os
import signal
import sys
from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from detectors.errors import LiveptychoError
from stream.cli import files, live, simulated

app = typer.Typer(
    name="liveptycho",
    help="Live single-sideband ptychography: the phase image of a 4D-STEM scan while it is being scanned.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (
    simulated.demo,
    simulated.simulate,
    live.live,
    live.record,
    files.replay,
    files.reconstruct,
    live.view,
    files.info,
    live.check,
):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"liveptycho {version('liveptycho')}")
        raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[
        bool, typer.Option("--debug", help="Log details, and show a traceback when something fails.")
    ] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=debug, show_time=debug)],
    )
    if debug:  # our own details, not those of every library
        for package in ("stream", "detectors"):
            logging.getLogger(package).setLevel(logging.DEBUG)


def main() -> None:
    """Run the command line. A user's mistake ends in one line on stderr and exit code 1, Ctrl-C in 130."""
    debug = "--debug" in sys.argv
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        app()
    except LiveptychoError as error:
        if debug:
            raise
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Exception as error:
        if debug:
            raise
        _fail(f"internal error: {type(error).__name__}: {error} (run with --debug before the command for details)", 70)


def _fail(message: str, code: int) -> None:
    sys.stdout.flush()
    sys.stderr.write(f"liveptycho: {message}\n")
    sys.stderr.flush()
    # Threads that still compute must not delay the prompt.
    os._exit(code)

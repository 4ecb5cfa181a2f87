"""The command line: commands parse, call the library and print. Errors are one line and exit code 2."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import NoReturn

from baffle.errors import BaffleError, MissingExtraError

try:
    import rich.markup
    import typer
except ImportError as error:
    raise MissingExtraError("the command line needs typer and rich: pip install 'baffle[cli]'") from error

from baffle.cli.calibrate import calibrate_command
from baffle.cli.common import errors
from baffle.cli.data import data_command
from baffle.cli.evaluate import evaluate_command
from baffle.cli.export import export_command
from baffle.cli.models import models_command
from baffle.cli.node import app_command, node_command
from baffle.cli.replay import replay_command
from baffle.cli.report import compare_command, report_command
from baffle.cli.resume import resume_command
from baffle.cli.status import status_command
from baffle.cli.train import train_command
from baffle.cli.up import up_command

app = typer.Typer(
    name="baffle",
    help="Federated learning without backpropagation: clients run forward passes and return K numbers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("train")(train_command)
app.command("resume")(resume_command)
app.command("status")(status_command)
app.command("replay")(replay_command)
app.command("evaluate")(evaluate_command)
app.command("report")(report_command)
app.command("compare")(compare_command)
app.command("node")(node_command)
app.command("up")(up_command)
app.command("app")(app_command)
app.command("export")(export_command)
app.command("calibrate")(calibrate_command)
app.command("models")(models_command)
app.command("data")(data_command)

# typer has its own exception since 0.28; older versions, which Flower requires, raise click's
_BAD_USAGE: type[Exception] = getattr(typer, "TyperException", None) or import_module("click").ClickException
_INTERRUPTED = 130  # exit code after Ctrl-C, as typer's


def main() -> None:
    """Entry point: errors are one line on stderr and exit code 2."""
    code = 0
    try:
        code = app(standalone_mode=False) or 0
    except BaffleError as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except _BAD_USAGE as error:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        if message:
            _fail(f"{message.rstrip('.')} (see --help)")
        code = 2  # no command: the help was shown
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)


def _fail(message: str) -> NoReturn:
    line = " ".join(message.split())
    errors.print("[bold red]error:[/bold red]", rich.markup.escape(line), soft_wrap=True, highlight=False, emoji=False)
    sys.exit(2)

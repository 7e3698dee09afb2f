"""The command line: commands in groups, errors as one short paragraph, exit codes.

Exit 0 done, 1 failed, 2 the user's input is wrong, 130 or 143 stopped by a signal with the state saved.
"""

from __future__ import annotations

import difflib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

import mrlm_cli
from mrlm_cli import blame
from mrlm_cli.cli import collecting, inspecting, machine, playing, running
from mrlm_cli.errors import MrlmError

# typer bundles its parser or imports click, by version; in both this is the base of what a person can type wrong.
_Usage: type[Exception] = typer.BadParameter.__mro__[2]
_STOPPED = 130

app = typer.Typer(
    name="mrlm",
    help="Train language models by reinforcement learning from one YAML recipe: `mrlm train quickstart`.",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
running.register(app)
inspecting.register(app)
collecting.register(app)
playing.register(app)
machine.register(app)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may also stand behind the command.")] = False,
) -> None:
    if version:
        print(f"mrlm {mrlm_cli.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; whatever goes wrong is one paragraph on stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without Unicode still shows every line
    debug = blame.debug = "--debug" in given
    try:
        code = app([word for word in given if word != "--debug"], prog_name="mrlm", standalone_mode=False)
        sys.stdout.flush()
        if code == _STOPPED:  # typer makes this of a KeyboardInterrupt
            print("stopped", file=sys.stderr)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _failed("stopped", _STOPPED, debug)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MrlmError as error:
        return _failed(str(error), error.exit_code, debug)
    except _Usage as error:
        return _failed(_usage(str(error), given), 2, debug)
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        return _failed(f"{error.strerror or error}{place}", 1, debug)
    except Exception as error:
        where = blame.place(error) or "a bug in mrlm or in a plugin"
        return _failed(f"{type(error).__name__}: {error} ({where}; --debug shows the whole traceback)", 1, debug)


def _usage(text: str, given: Sequence[str]) -> str:
    known = {command.name or "" for command in app.registered_commands}
    command = next((word for word in given if not word.startswith("-")), "")
    if command in known or not command:
        return f"{text.rstrip('.')}; see mrlm {command or ''} --help".replace("  ", " ")
    close = difflib.get_close_matches(command, known, n=1)
    return f"mrlm has no command {command}; " + (f"did you mean {close[0]}?" if close else "see mrlm --help")


def _failed(text: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(text, file=sys.stderr)
    return code

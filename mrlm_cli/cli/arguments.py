"""Words of a command line: which are overrides, which files, and the right form for what was meant otherwise."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from mrlm_cli.errors import UserError
from mrlm_cli.recipe import explain

# Unknown options reach the command as words, so that it can answer with the form that was meant.
LENIENT = {"ignore_unknown_options": True}
OVERRIDES = "Overrides such as optimizer.lr=1e-4 or environments.0.digits=2; the last one wins."
_FILES = ("--config", "--recipe", "--file", "-c", "-f", "--yaml")


def no_flag(value: str | None) -> str | None:
    """A value that begins with `-` is a flag whose option was left without its value."""
    if value is not None and str(value).startswith("-"):
        raise typer.BadParameter(f"expected a path, got the flag {value}")
    return value


Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help=OVERRIDES, show_default=False)]
Overlay = Annotated[
    str | None,
    typer.Option("--overlay", metavar="FILE", help="A file merged over the recipe.", callback=no_flag),
]
RunDir = Annotated[
    str | None,
    typer.Option("--run-dir", metavar="DIR", help="Where to write; by default runs/NAME.", callback=no_flag),
]
Whose = Annotated[
    str | None,
    typer.Option("--recipe", metavar="RECIPE", help="Whose tasks; by default the run's own.", callback=no_flag),
]
Changes = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Overrides of steps, evaluate, checkpoint or report, such as steps=600.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print data as JSON.")]


def words(context: typer.Context, given: Sequence[str | None]) -> list[str]:
    """The given words, none of which is an option. Raises UserError with the right form for one that is."""
    found = [word for word in given if word is not None]
    for position, word in enumerate(found):
        if word.startswith("-") and word != "-":
            following = found[position + 1] if position + 1 < len(found) else None
            raise UserError(_right_form(context, word, following))
    return found


def is_override(word: str) -> bool:
    """True for key=value; a path may hold a `=` after its first `/`."""
    return "=" in word and "/" not in word.partition("=")[0]


def print_json(data: Any) -> None:
    """Data for programs, on stdout."""
    print(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))


def _right_form(context: typer.Context, word: str, following: str | None) -> str:
    command = f"mrlm {context.info_name}"
    name, equals, value = word.partition("=")
    value = value if equals else (following or "")
    if name in _FILES:
        return f"{name} is no option; the recipe is an argument: {command} {value or 'RECIPE'}"
    options = [option for parameter in context.command.params for option in parameter.opts if option.startswith("--")]
    close = difflib.get_close_matches(name.replace("_", "-"), options, n=1, cutoff=0.8)
    if close:
        return f"{command} has no option {name}; did you mean {close[0]}?"
    wanted = name.lstrip("-").replace("-", "_")
    known = explain.paths()
    leaves = sorted((key for key in known if key.rpartition(".")[2] == wanted), key=lambda key: key.count("."))
    near = leaves[:1] or difflib.get_close_matches(wanted, known, n=1, cutoff=0.7)
    if wanted in known or near:
        key = wanted if wanted in known else near[0]
        return f"{name} is no option; settings are given as key=value: {command} … {key}={value or 'VALUE'}"
    return f"{command} has no option {name}; see {command} --help"

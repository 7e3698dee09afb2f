"""collect: what a policy says, as rows to learn from."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, cast

import typer

from mrlm_cli.cli.arguments import LENIENT, Overrides, is_override, no_flag, words
from mrlm_cli.errors import UserError
from mrlm_cli.events import Wanted
from mrlm_cli.records import Split


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("collect", rich_help_panel="Models", context_settings=LENIENT)(collect)


def collect(
    context: typer.Context,
    target: Annotated[
        str, typer.Argument(help="A run, a checkpoint, a model's directory, a hub id, or scripted:oracle.")
    ],
    overrides: Overrides = None,
    environment: Annotated[
        str | None,
        typer.Option("--environment", metavar="NAME", help="Whose tasks; key=value sets it up.", callback=no_flag),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", metavar="RECIPE", help="Or a recipe's tasks.", callback=no_flag)
    ] = None,
    tasks: Annotated[int, typer.Option("--tasks", help="Tasks, the first of the split.", min=1)] = 256,
    samples: Annotated[
        int | None, typer.Option("--samples", help="Episodes of each; by default 1, with --pairs 8.", min=1)
    ] = None,
    pairs: Annotated[
        bool,
        typer.Option(
            "--pairs", help="Pairs of a verified right and a verified wrong answer, alike in form and length."
        ),
    ] = False,
    least: Annotated[
        float | None, typer.Option("--min-reward", help="Only episodes that earned so much.", show_default=False)
    ] = None,
    component: Annotated[
        str | None, typer.Option("--component", help="Reward component of --min-reward, such as exact.")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="train, validation or test.")] = "train",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="A new file; by default the terminal.")
    ] = None,
) -> None:
    """Write what a policy says as JSON lines: conversations for sft, or preference pairs."""
    place, *settings = words(context, [target, *(overrides or ())])
    if wrong := [word for word in settings if not is_override(word)]:
        raise UserError(f"expected key=value instead of {wrong[0]}; the tasks are named by --environment or --recipe")
    if split not in ("train", "validation", "test"):
        raise UserError(f"--split {split}: expected train, validation or test")
    if (pairs and least is not None) or (least is None and component is not None):
        raise UserError("--min-reward is for conversations, not for --pairs, and --component says what it speaks of")
    if out is not None and not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no directory {out.parent}")
    if out is not None and out.exists():
        raise UserError(f"--out {out}: exists already; choose another file, or remove it")
    from mrlm_cli import api

    wanted = Wanted(tasks, samples or (8 if pairs else 1), cast(Split, split), pairs, component, least)
    what = "pairs" if pairs else "conversations"
    found = api.collect(place, wanted, environment=environment, recipe=recipe, overrides=settings)
    if not found.rows:
        raise UserError(f"{found.summary(what)}; nothing is written")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows)
    if out is None:
        sys.stdout.write(lines)
    else:
        out.write_text(lines, encoding="utf-8")
    print(found.summary(what), file=sys.stderr)

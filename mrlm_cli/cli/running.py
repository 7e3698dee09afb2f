"""The commands that people live in: train, eval, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mrlm_cli.cli.arguments import (
    LENIENT,
    AsJson,
    Changes,
    Overlay,
    Overrides,
    RunDir,
    Whose,
    is_override,
    print_json,
    words,
)
from mrlm_cli.errors import UserError
from mrlm_cli.events import Evaluation

_PANEL = "Train and evaluate"
_Plain = Annotated[bool, typer.Option("--plain", help="Plain lines instead of the live view.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("train", rich_help_panel=_PANEL, context_settings=LENIENT)(train)
    app.command("eval", rich_help_panel=_PANEL, context_settings=LENIENT)(evaluate)
    app.command("resume", rich_help_panel=_PANEL, context_settings=LENIENT)(resume)


def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A recipe's file, or the name of a shipped one.")],
    overrides: Overrides = None,
    run_dir: RunDir = None,
    overlay: Overlay = None,
    continue_run: Annotated[
        bool, typer.Option("--continue", help="Go on with a run of the same recipe, or start it.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and say what would be done.")] = False,
    plain: _Plain = False,
) -> None:
    """Train a policy by a recipe."""
    file, *settings = words(context, [recipe, *(overrides or ())])
    from mrlm_cli import api
    from mrlm_cli.cli import plan

    composed = api.load_recipe(file, settings, overlay)
    place = Path(run_dir) if run_dir else Path("runs") / composed.recipe.name
    if dry_run:
        plan.dry_run(composed, place, continue_run)
    else:
        api.train(composed, run_dir=place, continue_run=continue_run, plain=plain)


def resume(
    context: typer.Context,
    run_dir: Annotated[
        str | None, typer.Argument(help="A run directory; by default the newest under runs/.", show_default=False)
    ] = None,
    overrides: Changes = None,
    plain: _Plain = False,
) -> None:
    """Go on with a run from its newest whole checkpoint, bit for bit; steps=N trains longer."""
    given = words(context, [run_dir, *(overrides or ())])
    place = Path(given.pop(0)) if given and not is_override(given[0]) else None
    from mrlm_cli import api

    api.resume(place, given, plain=plain)


def evaluate(
    context: typer.Context,
    target: Annotated[
        str | None,
        typer.Argument(help="A run, a checkpoint, a model's directory or a hub id.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    recipe: Whose = None,
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            metavar="POLICY",
            help="Instead of a target: scripted:oracle (must be exact) or scripted:random.",
        ),
    ] = None,
    best: Annotated[bool, typer.Option("--best", help="The run's best checkpoint instead of its latest.")] = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate on held-out test tasks."""
    given = words(context, [target, *(overrides or ())])
    if policy is not None:
        _show(_scripted(policy, recipe, given, best), as_json)
        return
    if not given or is_override(given[0]):
        raise UserError("expected what to evaluate: mrlm eval TARGET, or mrlm eval --policy scripted:oracle --recipe R")
    place, *settings = given
    if any(not is_override(word) for word in settings):
        raise UserError(f"one target at a time; and the recipe is an option here: mrlm eval {place} --recipe RECIPE")
    from mrlm_cli import api

    _show(api.evaluate(place, recipe=recipe, overrides=settings, best=best), as_json)


def _scripted(policy: str, recipe: str | None, given: list[str], best: bool) -> Evaluation:
    if recipe is None or best or not all(is_override(word) for word in given):
        raise UserError(
            f"a scripted policy has no checkpoint: mrlm eval --policy {policy} --recipe RECIPE [key=value …]"
        )
    from mrlm_cli import api

    return api.evaluate_script(policy, recipe, given)


def _show(evaluation: Evaluation, as_json: bool) -> None:
    if as_json:
        print_json(evaluation.to_json())
        return
    held_out = f"{evaluation.tasks} held-out {evaluation.unit} of split {evaluation.split}"
    step = f", step {evaluation.step}" if evaluation.step else ""  # 0: a model or a script, which no run trained
    print(f"{evaluation.checkpoint}{step}: {held_out}")
    reward = {} if evaluation.reward is None else {"reward": evaluation.reward}
    for name, estimate in {**evaluation.components, **reward}.items():
        print(f"  {name:<20} {estimate.mean:.3f}  95 % interval {estimate.low:.3f} to {estimate.high:.3f}")
    for count, share in evaluation.pass_at.items():
        print(f"  pass@{count:<15} {share:.3f}")
    for name, value in evaluation.findings.items():
        print(f"  {name:<20} {value:.4f}")
    for place, received in {**evaluation.environments, **evaluation.agents}.items():
        print(f"  {place:<20} " + ", ".join(f"{name} {estimate.mean:.3f}" for name, estimate in received.items()))
    print(f"  {'length':<20} {evaluation.length:.1f} tokens; {evaluation.truncated:.1%} cut by a limit")
    if evaluation.failed:
        what = "rows" if evaluation.reward is None else "episodes"
        print(f"  {evaluation.fault:<20} {evaluation.failed} {what} left out")

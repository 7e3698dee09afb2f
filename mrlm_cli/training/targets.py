"""What `mrlm eval` and `mrlm collect` are pointed at: a run, a checkpoint of one, or a model of whatever origin."""

from __future__ import annotations

import sys
from pathlib import Path

from mrlm_cli.errors import CheckpointError, UserError
from mrlm_cli.recipe import compose
from mrlm_cli.training import checkpoint
from mrlm_cli.training.rundir import RunDirectory


def find(path: Path, best: bool) -> tuple[RunDirectory | None, Path | None]:
    """The run, if there is one, and the whole checkpoint that the path means, if it means one.

    A run means its newest whole checkpoint, or its best. Raises UserError, CheckpointError.
    """
    if is_run(path):
        run = RunDirectory.open(path)
        if best:
            chosen: Path | None = run.checkpoints / "best"
        else:  # verified already
            chosen = checkpoint.newest_whole(run.checkpoints, lambda text: print(text, file=sys.stderr))
        if chosen is None or not chosen.exists():
            raise CheckpointError(f"{path} has no {'best' if best else 'whole'} checkpoint yet")
        return run, _whole(chosen.resolve()) if best else chosen.resolve()
    if best:
        raise UserError(f"--best picks among a run's checkpoints, and {path} is not a run directory")
    if (path / checkpoint.MANIFEST).is_file():
        chosen = path.resolve()
        home = chosen.parent.parent
        return (RunDirectory.open(home) if (home / "origin.json").is_file() else None), _whole(chosen)
    return None, None


def is_run(path: Path) -> bool:
    """Whether the path is a run's directory, and not one of its checkpoints."""
    return (path / "checkpoints").is_dir()


def brings_recipe(path: Path) -> bool:
    """Whether the path is a run or a checkpoint, which know what they were trained on."""
    return is_run(path) or (path / checkpoint.MANIFEST).is_file()


def no_recipe(target: Path, options: str = "--recipe RECIPE") -> str:
    """What to say of a target that is neither a run nor a checkpoint, where its tasks are asked for; `options` name
    them."""
    here = target.exists()
    beside = Path("runs") / target
    if not here and is_run(beside):
        return f"{target} is no run or checkpoint here; did you mean {beside}?"
    if (target.suffix in (".yaml", ".yml") and target.is_file()) or (
        not here and str(target) in compose.shipped("recipes")
    ):
        return f"{target} is a recipe; expected what it trained: a run, or a model with --recipe {target}"
    what = "brings no tasks" if here else "is no run or checkpoint here; a model brings no tasks"
    return f"{target} {what}: say which with {options}"


def _whole(directory: Path) -> Path:
    checkpoint.verify(directory)
    return directory

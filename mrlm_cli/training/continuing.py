"""Whether and from where a run can be gone on with. Nothing is changed here, so that a dry run may ask too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mrlm_cli.errors import CheckpointError, UserError
from mrlm_cli.recipe import checkpoints, compose
from mrlm_cli.recipe.compose import Composed
from mrlm_cli.recipe.schema import Recipe
from mrlm_cli.training.rundir import RunDirectory, untrained


def is_there(path: Path) -> bool:
    """Whether something lies at `path` that could be gone on with: a run without a step is begun anew."""
    return path.exists() and not untrained(path)


def same_run(path: Path, composed: Composed, settled: Recipe) -> RunDirectory:
    """The run at `path`. Raises UserError if it is of another recipe than `composed`, or no run.

    `settled` is that recipe with what depends on machine and data filled in.
    """
    run = RunDirectory.open(path)
    folders = tuple(Path(folder) for folder in run.origin()["folders"])
    there = compose.load(path / "recipe.yaml", folders=folders).recipe
    if differs := compose.different(there, composed.recipe, settled):
        raise UserError(
            f"{path} holds a run of another recipe{differs}; "
            f"choose another with --run-dir or name=…, or go on with it as it is: mrlm resume {path}"
        )
    return run


def newest(run: RunDirectory, warn: Callable[[str], None]) -> Path | None:
    """The checkpoint from which the run goes on; None if it begins at step 0. Broken ones are told to `warn`.

    Raises CheckpointError if steps were saved and none can be read: going on from step 0 would throw the run's records
    away for what may be a passing fault.
    """
    found = checkpoints.newest_whole(run.checkpoints, warn)
    if found is None and (broken := checkpoints.trained(run.checkpoints)):
        raise CheckpointError(
            f"{run.path}: none of its checkpoints is whole ({broken[0].name} is the newest); "
            "bring one back, or begin anew under another --run-dir"
        )
    return found

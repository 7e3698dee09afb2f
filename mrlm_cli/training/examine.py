"""`mrlm eval`: a run, a checkpoint or any model on a test split, outside of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mrlm_cli.envs.host import NoJournal
from mrlm_cli.errors import MrlmError, UserError
from mrlm_cli.events import Evaluation
from mrlm_cli.recipe import compose
from mrlm_cli.recipe.schema import Recipe
from mrlm_cli.recipe.sections import PretrainedModel
from mrlm_cli.records import Episode
from mrlm_cli.training import held_out, targets
from mrlm_cli.training.checkpoint import state
from mrlm_cli.training.evaluate import evaluate
from mrlm_cli.training.rundir import RunDirectory
from mrlm_cli.training.stage import Stage, settled
from mrlm_cli.training.summary import stored


def examine(target: str, recipe: str | None, overrides: Sequence[str], best: bool) -> Evaluation:
    """Evaluate what `target` means by its own recipe, or by another. Raises UserError, CheckpointError."""
    while True:
        run, checkpoint = targets.find(Path(target), best)
        try:
            return _evaluated(target, run, checkpoint, recipe, overrides)
        except MrlmError:
            if checkpoint is None or checkpoint.exists() or not targets.is_run(Path(target)):
                raise
            # The process that trains in the run has pruned the checkpoint meanwhile: there is a newer one.


def _evaluated(
    target: str, run: RunDirectory | None, checkpoint: Path | None, recipe: str | None, overrides: Sequence[str]
) -> Evaluation:
    folders = tuple(Path(folder) for folder in run.origin()["folders"]) if run else (Path.cwd(),)
    if recipe is not None:
        composed = compose.load(recipe, overrides)
        folders = composed.folders
    elif checkpoint is not None:
        composed = compose.load(checkpoint / "recipe.yaml", overrides, folders=folders)
    else:
        raise UserError(targets.no_recipe(Path(target)))
    loaded = composed.recipe
    if loaded.data is not None:
        if checkpoint is None:
            raise UserError(f"{target} is no run or checkpoint; held-out rows are for those: give a recipe with tasks")
        evaluation, episodes = _held_out_rows(settled(loaded, folders), folders, checkpoint)
        if run is not None and recipe is None and not overrides:
            _keep(run, evaluation, episodes, loaded)
        return evaluation
    step = state(checkpoint)["step"] if checkpoint else 0
    path = str(checkpoint / "policy") if checkpoint else target
    model = PretrainedModel(type="pretrained", path=path, chat=loaded.model.chat)
    with Stage(
        settled(loaded.model_copy(update={"model": model})),
        folders,
        journal=NoJournal(),
        check=lambda: None,
        phase=lambda name, done, total: None,
        values=False,
        start=loaded.model,
    ) as stage:
        stage.engine.load(stage.policy.lm)
        evaluation, episodes = evaluate(
            stage.rollout(bootstrap=False),
            stage.environments,
            loaded.evaluate,
            split="test",
            seed=loaded.seed,
            step=step,
            checkpoint=str(checkpoint or target),
            findings=stage.findings(),
        )
    if run is not None and recipe is None and not overrides:
        _keep(run, evaluation, episodes, loaded)
    return evaluation


def _keep(run: RunDirectory, evaluation: Evaluation, episodes: Sequence[Episode], recipe: Recipe) -> None:
    run.write_evaluation(evaluation.step, {**asdict(evaluation), "episodes": stored(episodes, recipe.report.episodes)})


def _held_out_rows(recipe: Recipe, folders: Sequence[Path], checkpoint: Path) -> tuple[Evaluation, list[Episode]]:
    """The checkpoint of a run on data, judged on its held-out rows, against the model that the run started at.

    Raises UserError if the recipe holds nothing out, or the model is not there any more.
    """
    with Stage(recipe, folders, journal=NoJournal(), check=lambda: None, phase=lambda name, done, total: None) as stage:
        return held_out.of_checkpoint(stage, recipe, folders, checkpoint)

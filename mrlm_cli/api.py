"""One function for each heavy command: joins training to report.

Importing this module imports neither torch nor transformers; calling its functions does.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from mrlm_cli import registry
from mrlm_cli.errors import UserError
from mrlm_cli.events import Collected, Evaluation, Listener, Wanted
from mrlm_cli.recipe import checkpoints, compose
from mrlm_cli.recipe.agents import Scripted
from mrlm_cli.recipe.compose import Checked, Composed
from mrlm_cli.recipe.schema import Recipe
from mrlm_cli.recipe.sections import Sampling

if TYPE_CHECKING:
    from mrlm_cli.data.load import Loaded
    from mrlm_cli.envs.play import Person, Played
    from mrlm_cli.recipe.outside import Absent
    from mrlm_cli.records import Split
    from mrlm_cli.training.rundir import RunDirectory

RESUMABLE = ("steps", "evaluate", "checkpoint", "report")  # what a resume may change: nothing of the past depends on it


def load_recipe(recipe: str | Path, overrides: Sequence[str] = (), overlay: str | Path | None = None) -> Composed:
    """Read, compose and validate a recipe. Raises RecipeError."""
    return compose.load(recipe, overrides, overlay)


def load_data(composed: Composed) -> Loaded:
    """The rows of a recipe's data. Raises UserError for bad ones and where there is no data, MissingExtra."""
    from mrlm_cli.data.load import of

    if composed.recipe.data is None:
        raise UserError(f"{composed.path} has no section data")
    return of(composed.recipe.data, composed.folders)


def fetch(name: str, to: Path | None = None) -> Path:
    """Bring a known pretrained model onto this machine; returns its directory."""
    from mrlm_cli.policy.fetch import fetch as bring

    return bring(name, to)


def demand(composed: Composed) -> None:
    """Raises RecipeError for whatever the recipe names and is not there."""
    from mrlm_cli.recipe import outside

    outside.demand(absent(composed))


def first_step(composed: Composed, run_dir: Path, *, continue_run: bool, warn: Callable[[str], None]) -> int:
    """The step from which `train` would go on in `run_dir`: 0 for a new run. Broken checkpoints are told to `warn`.

    Raises what `train` would: UserError if the name is taken or, with `continue_run`, is another recipe's,
    CheckpointError, RunDirectoryError if a process trains in it. Imports torch only to compare with a run.
    """
    from mrlm_cli.training import continuing
    from mrlm_cli.training.rundir import RunDirectory

    if not (continue_run and continuing.is_there(run_dir)):
        RunDirectory.refuse_existing(run_dir)
        return 0
    _import_training()
    from mrlm_cli.training.stage import settled

    run = continuing.same_run(run_dir, composed, settled(composed.recipe, composed.folders))
    with run.lock():
        checkpoint = continuing.newest(run, warn)
    return 0 if checkpoint is None else checkpoints.step_of(checkpoint)


def absent(checked: Composed | Checked) -> list[Absent]:
    """Files, functions, models, runs, extras that a recipe or fragment needs and are not there. Nothing is loaded."""
    from mrlm_cli.policy import fetch
    from mrlm_cli.recipe import outside

    models = outside.Models(fetch.KNOWN, fetch.missing)
    return outside.absent(checked.tree, checked.sections, checked.folders, models)


def train(composed: Composed, *, run_dir: Path | None = None, continue_run: bool = False, plain: bool = False) -> Path:
    """Train a recipe in a new run directory, or go on with an identical one; returns the directory.

    A run of that name which ended before its first step is replaced. Raises UserError if the directory exists otherwise
    (or, with `continue_run`, holds another recipe), RecipeError for what it names and is not there, Interrupted after a
    signal, NonFiniteError.
    """
    demand(composed)
    _import_training()
    from mrlm_cli.training import continuing, machine
    from mrlm_cli.training.rundir import RunDirectory
    from mrlm_cli.training.stage import settled

    path = run_dir or Path("runs") / composed.recipe.name
    recipe = settled(composed.recipe, composed.folders)
    recipe_yaml = compose.dump(recipe)
    if continue_run and continuing.is_there(path):
        return resume(continuing.same_run(path, composed, recipe).path, (), plain=plain)
    RunDirectory.refuse_existing(path)
    origin = {
        "origins": composed.origins,
        "folders": [str(folder) for folder in composed.folders],
        "plugins": registry.plugin_hashes(_plugin_names(recipe), composed.folders),
    }

    def create() -> RunDirectory:
        return RunDirectory.create(path, recipe_yaml=recipe_yaml, origins=origin, machine=machine.describe())

    _run(recipe, composed.folders, RunDirectory(path), create, plain, None)
    return path


def resume(run_dir: Path | None, overrides: Sequence[str] = (), *, plain: bool = False) -> Path:
    """Go on with a run from its newest whole checkpoint; without a directory, with the newest run under ./runs.

    Only `steps`, `evaluate`, `checkpoint` and `report` may be overridden. Returns the directory; a run that has come
    to its end is left as it is.
    """
    from mrlm_cli.training.rundir import RunDirectory, latest_run

    run = RunDirectory.open(run_dir if run_dir is not None else latest_run())
    for override in overrides:
        if override.partition("=")[0].partition(".")[0] not in RESUMABLE:
            raise UserError(f"override {override}: a resume may change only {', '.join(RESUMABLE)}")
    origin = run.origin()
    folders = tuple(Path(folder) for folder in origin["folders"])
    composed = compose.load(run.path / "recipe.yaml", overrides, folders=folders)
    recipe_yaml = compose.dump(composed.recipe)

    def record() -> RunDirectory:
        if overrides:
            run.update_recipe(recipe_yaml, {**origin, "origins": {**origin["origins"], **_overridden(composed)}})
        return run

    _import_training()
    _run(composed.recipe, folders, run, record, plain, origin["plugins"])
    return run.path


def sandbox() -> str:
    """The mechanism that confines untrusted programs here, found by trying; or why there is none."""
    from mrlm_cli.envs.sandbox import probe

    try:
        return probe.choose().name
    except UserError as error:
        return f"none: {error}"


def c_compiler() -> str:
    """What compiles the kernels in C here; or why they cannot be had."""
    from mrlm_cli.kernels import build

    try:
        return build.compiler()
    except build.CannotBuild as error:
        return f"none: {error}"


def evaluate(
    target: str, *, recipe: str | None = None, overrides: Sequence[str] = (), best: bool = False
) -> Evaluation:
    """Evaluate a run, a checkpoint or any model on the test split.

    A run or a checkpoint brings its own recipe; a model directory or hub id needs one.
    Raises UserError, CheckpointError.
    """
    from mrlm_cli.training import targets

    if recipe is None and not targets.brings_recipe(Path(target)):
        raise UserError(targets.no_recipe(Path(target)))
    _import_training()
    from mrlm_cli.training import examine

    return examine.examine(target, recipe, overrides, best)


def export(target: str, directory: Path, *, dtype: str | None = None, best: bool = False) -> str:
    """Write a run's or directory's policy as a plain transformers directory. Raises UserError, CheckpointError."""
    if not Path(target).expanduser().is_dir():
        raise UserError(f"there is no directory {target}; expected a run, a checkpoint or a model's directory")
    from mrlm_cli.training.export import export as write

    return write(Path(target).expanduser(), directory, dtype, best)


def evaluate_script(policy: str, recipe: str, overrides: Sequence[str] = ()) -> Evaluation:
    """Evaluate a policy without a model, `scripted:oracle` or `scripted:random`, on a recipe's test split.

    A test of the environments: the first must be exactly right, the second at the level of chance. Raises UserError.
    """
    from mrlm_cli.envs.host import Host, NoJournal
    from mrlm_cli.envs.scripted import script
    from mrlm_cli.rewards.firewall import Scorers
    from mrlm_cli.training.evaluate import evaluate as judge
    from mrlm_cli.training.scripted import ScriptedRollout

    chosen = script(policy)
    composed = compose.load(recipe, overrides)
    loaded = composed.recipe
    hardware = loaded.hardware
    folders, workers = composed.folders, hardware.worker_processes
    with (
        Host(
            loaded.environments, folders=folders, workers=workers, deadline=hardware.deadline, journal=NoJournal()
        ) as host,
        Scorers(loaded.rewards, folders=folders, workers=workers, journal=NoJournal()) as scorers,
    ):
        rollout = ScriptedRollout(
            host,
            chosen,
            max_turns=loaded.sampling.max_turns,
            phase=lambda name, done, total: None,
            scorers=scorers,
        )
        evaluation, _ = judge(
            rollout, host.environments, loaded.evaluate, split="test", seed=loaded.seed, step=0, checkpoint=policy
        )
    return evaluation


def play(environment: str, settings: Sequence[str], *, split: Split, index: int, seed: int, person: Person) -> Played:
    """One session of an environment with a person as the policy. Raises UserError, SessionFailure."""
    from mrlm_cli.envs.host import Host, NoJournal
    from mrlm_cli.envs.play import play as session

    config, folders = compose.environment(environment, settings)
    with Host([config], folders=folders, workers=1, deadline=60.0, journal=NoJournal()) as host:
        made = host.environments[config.label]
        size = made.size(split)
        if size is not None and index >= size:
            raise UserError(f"--task {index}: {config.label} has {size} {split} tasks, from 0 to {size - 1}")
        return session(host, made.task(split, index), seed, person)


def collect(
    target: str,
    wanted: Wanted,
    *,
    environment: str | None = None,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
) -> Collected:
    """Transcripts of a policy as rows to learn from: of a run, a checkpoint, any model, or a scripted policy.

    The tasks are those of an environment, of a recipe, or of the run itself. With an environment, overrides that begin
    with no section of a recipe are its settings. Raises UserError, CheckpointError.
    """
    from mrlm_cli.training import targets

    run, checkpoint = (None, None) if target.startswith("scripted:") else targets.find(Path(target), False)
    folders = tuple(Path(folder) for folder in run.origin()["folders"]) if run else (Path.cwd(),)
    own = None if checkpoint is None else compose.load(checkpoint / "recipe.yaml", folders=folders)
    if environment is not None and recipe is not None:
        raise UserError("the tasks are those of --environment or of --recipe, not of both")
    if environment is not None:
        registry.resolve("environments", environment, folders)
        kept = {} if own is None else own.recipe.model_dump(mode="json", include={"model", "sampling", "hardware"})
        fields = {"name": "collect", "steps": 1, "model": {"type": "scratch"}, "algorithm": {"type": "ppo"}, **kept}
        settings = [
            one if one.partition("=")[0].partition(".")[0] in Recipe.model_fields else f"environments.0.{one}"
            for one in overrides
        ]
        if own is not None:
            _demand_length(target, own.recipe, settings)
        chosen = compose.of({**fields, "environments": [{"type": environment}]}, environment, settings)
    elif recipe is not None:
        chosen = compose.load(recipe, overrides)
    elif checkpoint is not None and own is not None and own.recipe.data is None:
        chosen = compose.load(checkpoint / "recipe.yaml", overrides, folders=folders)
    else:
        options = "--environment NAME or --recipe RECIPE"
        if own is None and not target.startswith("scripted:"):
            raise UserError(targets.no_recipe(Path(target), options))
        why = "" if own is None else "was trained on data and "
        raise UserError(f"{target} {why}brings no tasks: say which with {options}")
    if not chosen.recipe.environments:
        raise UserError(f"{chosen.path} learns from data and has no tasks: say which with --environment NAME")
    _import_training()
    from mrlm_cli.training import collect as collecting

    return collecting.collect(target if checkpoint is None else str(checkpoint / "policy"), chosen, wanted)


def _import_training() -> None:
    """Import torch, transformers and what trains on them, with the garbage collector at rest.

    Thousands of modules make objects that all stay; walking through them again and again takes a fifth of the time.
    """
    resting = gc.isenabled()
    gc.disable()
    try:
        import_module("mrlm_cli.training.trainer")
    finally:
        if resting:
            gc.enable()


def _run(
    recipe: Recipe,
    folders: Sequence[Path],
    run: RunDirectory,
    enter: Callable[[], RunDirectory],
    plain: bool,
    plugins: Mapping[str, str] | None,
) -> None:
    """Build, then `enter` the run directory (so that a failed build leaves none behind), then train.

    `plugins` are the hashes recorded at the start of a run that is resumed; None for a new run.
    """
    from mrlm_cli.training import checkpoint, continuing, loop
    from mrlm_cli.training.announce import Announcer
    from mrlm_cli.training.stage import Stage
    from mrlm_cli.training.stopping import Stopper
    from mrlm_cli.training.trainer import Trainer
    from mrlm_cli.training.warned import KeptWarnings

    announce = Announcer([KeptWarnings(run), *_listeners(plain)])
    with (
        closing(announce),
        Stopper() as stopper,
        Stage(recipe, folders, journal=run.journal, check=stopper.check, phase=announce.phase) as stage,
    ):
        for text in stage.warnings():
            announce.warned(text)
        trainer = Trainer(recipe, folders, stage, run, announce)
        made = enter() if plugins is None else run
        with made.lock():
            if made.replaced:
                announce.warned(f"the former run {run.path} ended before its first step, and is replaced")
            if plugins is not None:
                checkpoint.sweep(run.checkpoints)
                if newest := continuing.newest(run, announce.warned):
                    trainer.load(newest)
                if trainer.step > recipe.steps:
                    raise UserError(f"steps={recipe.steps}: {run.path} has come to step {trainer.step} already")
                run.rewind(trainer.step)
                enter()
                for place in _changed(plugins, registry.plugin_hashes(_plugin_names(recipe), folders)):
                    announce.warned(f"{place} has changed since the run began: what follows is inexact")
            parameters = sum(parameter.numel() for parameter in trainer.policy.parameters())
            announce.started(run.path, recipe, trainer.step, parameters)
            loop.run(trainer, stopper)


def _demand_length(target: str, recipe: Recipe, settings: Sequence[str]) -> None:
    """Raises UserError where a run on data has so short a context that the default length of replies does not fit."""
    context = getattr(recipe.model, "context", None)
    given = any(one.startswith("sampling.max_") for one in settings)
    if recipe.data is not None and context is not None and context <= Sampling().max_new_tokens and not given:
        raise UserError(
            f"{target} was trained on data, which does not say how long a reply may be: add sampling.max_new_tokens=N, "
            f"less than its context of {context} tokens"
        )


def _listeners(plain: bool) -> list[Listener]:
    if plain or not sys.stdout.isatty():
        from mrlm_cli.report.plain import PlainLines

        return [PlainLines(sys.stdout)]
    from rich.console import Console

    from mrlm_cli.report.dashboard import Dashboard

    return [Dashboard(Console())]


def _plugin_names(recipe: Recipe) -> list[str]:
    players = [agent.player for agent in recipe.agents.values() if isinstance(agent, Scripted)]
    data = [] if recipe.data is None else [recipe.data.type]
    named = [recipe.algorithm.type, recipe.engine.type, *data, *(each.type for each in recipe.environments)]
    functions = [str(getattr(reward, "path", "")) for reward in recipe.rewards if reward.type == "function"]
    functions += [name for each in recipe.environments for name in getattr(each, "functions", ())]
    return [*named, *(each.type for each in recipe.rewards), *players, *functions]


def _changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return [place for place in sorted(before.keys() | now.keys()) if before.get(place) != now.get(place)]


def _overridden(composed: Composed) -> dict[str, str]:
    return {key: origin for key, origin in composed.origins.items() if origin.startswith("override")}

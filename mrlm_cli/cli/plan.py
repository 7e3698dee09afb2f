"""What a training would do, checked as far as files tell, without doing it."""

from __future__ import annotations

from pathlib import Path

from mrlm_cli import api, registry
from mrlm_cli.recipe.compose import Composed
from mrlm_cli.recipe.derived import Derived, derive


def dry_run(composed: Composed, run_dir: Path, continue_run: bool) -> None:
    """Print the plan. Raises MrlmError for what would stop the training at its start."""
    recipe = composed.recipe
    api.demand(composed)
    done = api.first_step(composed, run_dir, continue_run=continue_run, warn=print)
    for environment in recipe.environments:  # what it refuses, it refuses when it is made
        made = registry.resolve("environments", environment.type, composed.folders)(environment)
        path = getattr(environment, "path", None)
        if isinstance(path, str) and Path(path).is_file():
            made.size("train")  # reads every problem of the file
    for reward in recipe.rewards:
        registry.resolve("rewards", reward.type, composed.folders)(reward)
    names = ", ".join(environment.label for environment in recipe.environments)
    steps = recipe.steps
    if recipe.data is not None:
        loaded = api.load_data(composed)
        names = f"{len(loaded.train)} rows of data ({len(loaded.validation)} held out, {len(loaded.test)} for the test)"
        if recipe.data.epochs is not None:
            steps = loaded.steps(recipe.data.epochs, recipe.data.rows_per_step)
        names += f", each read {steps * recipe.data.rows_per_step / len(loaded.train):.1f} times,"
        print("".join(f"{note}\n" for note in loaded.notes()), end="")
    print(f"{composed.path.name}: {recipe.algorithm.type} on {names} for {steps} steps, into {run_dir}")
    if done:
        print(
            f"{run_dir} holds a run of this recipe, which "
            + (f"goes on from step {done}" if done < steps else "is at its end")
        )
    print("\n".join(derived_lines(derive(recipe, composed.folders))))
    print("dry run: everything above was checked, nothing was built, trained or written")


def derived_lines(derived: Derived) -> list[str]:
    """The derived numbers in words."""
    rows = [
        ("episodes a step", derived.episodes_per_step, ""),
        ("optimizer steps an iteration", derived.optimizer_steps_per_iteration, ""),
        ("optimizer steps in all", derived.optimizer_steps, ""),
        ("chosen tokens a step, at most", derived.chosen_tokens_per_step_at_most, ""),
        ("tokens a step, at most", derived.tokens_per_step_at_most, ""),
        ("parameters of the policy", derived.policy_parameters, ""),
        ("parameters of the value function", derived.value_parameters, ""),
        ("parameters that are trained", derived.trained_parameters, ""),
        ("memory, estimated", derived.memory_estimate_mib, " MiB"),
    ]
    return [
        f"  {name:<34} {'not known before model and data are here' if value is None else f'{value:,}{unit}'}"
        for name, value, unit in rows
    ]

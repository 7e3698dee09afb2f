"""Train a recipe with rewards shuffled among the episodes of each step: what still rises was not learnt from reward.

    python tests/benchmarks/shuffled_control.py quickstart steps=100

Every episode gets the whole reward of another one of its step, on its last chosen token; evaluations are as always.
Prints each evaluation, and returns them from `control`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mrlm_cli import api
from mrlm_cli.draws import shuffled
from mrlm_cli.events import Evaluation, Listener
from mrlm_cli.records import Episode
from mrlm_cli.report.plain import PlainLines
from mrlm_cli.training import loop
from mrlm_cli.training.announce import Announcer
from mrlm_cli.training.rundir import RunDirectory
from mrlm_cli.training.stage import Stage, settled
from mrlm_cli.training.stopping import Stopper
from mrlm_cli.training.trainer import Trainer


class Evaluations(Listener):
    """Keeps every evaluation."""

    def __init__(self) -> None:
        self.found: list[Evaluation] = []

    def evaluated(self, evaluation: Evaluation) -> None:
        """See Listener."""
        self.found.append(evaluation)


def control(folder: Path, recipe: str, overrides: Sequence[str], *listeners: Listener) -> list[Evaluation]:
    """All evaluations of a run whose rewards are shuffled."""
    composed = api.load_recipe(recipe, overrides)
    settled_recipe = settled(composed.recipe)
    evaluations = Evaluations()
    announce = Announcer([evaluations, *listeners])
    run = RunDirectory.create(folder / "control", recipe_yaml="", origins={}, machine={})
    with (
        Stopper() as stopper,
        Stage(
            settled_recipe, composed.folders, journal=run.journal, check=stopper.check, phase=announce.phase
        ) as stage,
        run.lock(),
    ):
        trainer = Trainer(settled_recipe, composed.folders, stage, run, announce)
        episodes = trainer.source.episodes
        trainer.source.episodes = lambda step: mixed(episodes(step), step)  # type: ignore[method-assign]
        announce.started(run.path, settled_recipe, 0, 0)
        loop.run(trainer, stopper)
    return evaluations.found


def mixed(episodes: Sequence[Episode], step: int) -> list[Episode]:
    """The episodes, each with the whole reward of another one."""
    order = shuffled(range(len(episodes)), "control", step)
    return [
        replace(one, rewards=_on_last(one, sum(episodes[other].rewards)))
        for one, other in zip(episodes, order, strict=True)
    ]


def _on_last(one: Episode, reward: float) -> tuple[float, ...]:
    rewards = [0.0] * len(one.tokens)
    if one.chosen:
        rewards[one.chosen[-1]] = reward
    return tuple(rewards)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        control(Path(place), sys.argv[1], sys.argv[2:], PlainLines(sys.stdout))

"""Which tasks a step is made of, and their episodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mrlm_cli.draws import draw_key, permuted
from mrlm_cli.envs.base import Environment
from mrlm_cli.envs.wire import describe_exception
from mrlm_cli.errors import UserError
from mrlm_cli.recipe.sections import Sampling
from mrlm_cli.records import Episode, Split, Task
from mrlm_cli.training.rollout import Draw, Rollout
from mrlm_cli.training.stopping import StopRequested


def take(environment: Environment, label: str, split: Split, index: int) -> Task:
    """The environment's task. Raises UserError if a user's class fails to make it or makes another one."""
    try:
        task = environment.task(split, index)
    except (UserError, StopRequested):
        raise
    except Exception as error:  # a border: a user's code may raise anything
        raise UserError(f"environment {label}: task({split!r}, {index}) raised {describe_exception(error)}") from error
    if not isinstance(task, Task) or (task.env, task.split, task.index) != (label, split, index):
        raise UserError(
            f"environment {label}: task({split!r}, {index}) must be a Task of env {label!r}, that split and index; "
            f"it is {task!r:.200}"
        )
    return task


def mixture(environments: Mapping[str, Environment], count: int, *parts: int | str) -> list[str]:
    """`count` environment labels drawn by weight, a function of `parts`."""
    labels = list(environments)
    if len(labels) == 1:
        return labels * count
    total = sum(environments[label].config.weight for label in labels)
    drawn = []
    for number in range(count):
        point = int.from_bytes(draw_key(*parts, number)[:7], "little") / 2**56 * total
        for label in labels:
            point -= environments[label].config.weight
            if point < 0:
                break
        drawn.append(label)
    return drawn


def held_out(environments: Mapping[str, Environment], split: Split, count: int) -> list[Task]:
    """The first tasks of a held-out split, shared over the environments by weight; fewer if a split is smaller."""
    total = sum(environment.config.weight for environment in environments.values())
    tasks: list[Task] = []
    share = 0.0
    for label, environment in environments.items():
        begin = round(share)
        share += count * environment.config.weight / total
        wanted = max(1, round(share) - begin)
        size = environment.size(split)
        if size == 0:
            raise UserError(f"environment {label} has no {split} tasks")
        within = range(wanted if size is None else min(wanted, size))
        tasks.extend(take(environment, label, split, index) for index in within)
    return tasks


Keep = Callable[[Sequence[Episode]], str | None]


class RolloutSource:
    """Fresh episodes of the training split. Its whole state is one cursor for each environment.

    `keep` judges the episodes of one task and agent: None, or the reason why they are not trained on.
    """

    def __init__(
        self, rollout: Rollout, environments: Mapping[str, Environment], sampling: Sampling, seed: int, keep: Keep
    ) -> None:
        self._rollout = rollout
        self._environments = environments
        self._sampling = sampling
        self._seed = seed
        self._keep = keep
        self._cursor = dict.fromkeys(environments, 0)
        for label, environment in environments.items():
            if environment.size("train") == 0:
                raise UserError(f"environment {label} has no training tasks")

    def episodes(self, step: int) -> list[Episode]:
        """The episodes of a step, sampled by the policy that the engine holds; advances the cursor.

        A task of which no group is kept stays among them, marked `left_out`, and the next task in order is sampled in
        its place, in at most `sampling.refills` rounds: what is short then stays short.
        """
        found: list[Episode] = []
        taken, missing = 0, self._sampling.tasks_per_step
        for attempt in range(self._sampling.refills + 1):
            draw = Draw(self._seed, "train", step, step, attempt, taken)
            tasks = self._tasks(step, taken, missing)
            sampled = self._rollout.episodes(tasks, self._sampling.episodes_per_task, draw, self._sampling.temperature)
            judged, missing = self._judged(sampled)
            found += judged
            taken += len(tasks)
            if missing == 0:
                break
        return found

    def _judged(self, episodes: Sequence[Episode]) -> tuple[list[Episode], int]:
        """The episodes, marked where their group is left out, and the number of tasks of which no group is kept."""
        groups: dict[str, list[Episode]] = {}
        for one in episodes:
            groups.setdefault(one.group, []).append(one)
        reasons = {name: self._keep(group) for name, group in groups.items()}
        judged = [one if reasons[one.group] is None else replace(one, left_out=reasons[one.group]) for one in episodes]
        kept = {one.session for one in judged if one.left_out is None}
        lost = {one.session for one in judged} - kept
        return judged, len(lost) // self._sampling.episodes_per_task

    @property
    def decoding_seconds(self) -> float:
        """Seconds in which the engine made all episodes so far; not those in which environments were awaited."""
        return self._rollout.decoding_seconds

    def state(self) -> dict[str, Any]:
        """Tasks taken so far from each environment."""
        return {"cursor": dict(self._cursor)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._cursor = {label: int(state["cursor"][label]) for label in self._cursor}

    def _tasks(self, step: int, first: int, count: int) -> Sequence[Task]:
        """The next `count` tasks, of which the step has had `first` before."""
        tasks = []
        for label in mixture(self._environments, first + count, self._seed, "mixture", step)[first:]:
            taken = self._cursor[label]
            size = self._environments[label].size("train")
            if size is None:
                index = taken
            else:
                epoch, place = divmod(taken, size)
                index = permuted(place, size, self._seed, "order", label, epoch)
            tasks.append(take(self._environments[label], label, "train", index))
            self._cursor[label] = taken + 1
        return tasks

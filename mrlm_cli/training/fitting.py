"""Prompts and rows that do not fit the limits: left out, counted and named; a run in which none fits ends at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mrlm_cli.errors import UserError
from mrlm_cli.records import Episode
from mrlm_cli.training.rollout import EXCLUDED


class Fitting:
    """Whether anything fitted in this process so far. `warn` is told once of tasks that do not, in steps and in
    evaluations each."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self.any = False
        self._warn = warn
        self._told: set[str] = set()

    def look(self, what: str, step: int, episodes: Sequence[Episode]) -> None:
        """Take note of the episodes of a step or evaluation, which `what` says."""
        tasks = {(one.task.env, one.task.id): one for one in episodes}
        unfit = {name: one for name, one in tasks.items() if is_unfit(one)}
        self.any = self.any or len(unfit) < len(tasks)
        if unfit and self.any and what not in self._told:
            self._told.add(what)
            first = _named(next(iter(unfit.values())))
            self._warn(f"{what} {step}: {len(unfit)} of {len(tasks)} tasks are left out, such as {first}")


def is_unfit(one: Episode) -> bool:
    """Whether an episode never was, because its prompt or row does not fit the limits."""
    return one.failure is not None and one.failure.startswith(EXCLUDED)


def nothing_fits(episodes: Sequence[Episode], rows: int | None) -> UserError:
    """What to say where none of a step's tasks, or of so many training rows, fits."""
    if rows is not None:
        first = (episodes[0].failure or "").removeprefix(EXCLUDED)
        return UserError(
            f"none of the {rows} training rows can be used, such as {first}. If they are too long, raise "
            "data.max_tokens or model.context, or shorten them"
        )
    tasks = len({(one.task.env, one.task.id) for one in episodes})
    return UserError(
        f"none of the first {tasks} tasks leaves room for a reply, such as {_named(episodes[0])}. Raise "
        "sampling.max_tokens or model.context, or shorten the prompts"
    )


def _named(one: Episode) -> str:
    return f"{one.task.env} {one.task.id}: {(one.failure or '').removeprefix(EXCLUDED)}"

"""Held-out evaluation: each task once per requested episode, a mean and an interval that resamples tasks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from math import comb
from typing import Protocol

import numpy as np

from mrlm_cli.draws import integer
from mrlm_cli.envs.base import Environment
from mrlm_cli.errors import MrlmError
from mrlm_cli.events import Estimate, Evaluation
from mrlm_cli.recipe.sections import Evaluate
from mrlm_cli.records import Episode, Split, Task
from mrlm_cli.rewards.base import PREFIX
from mrlm_cli.training.rollout import Draw
from mrlm_cli.training.source import held_out

RESAMPLES = 2000


def interval(by_task: Sequence[float], name: str, seed: int) -> Estimate:
    """Mean over tasks with a 95 % percentile bootstrap interval over tasks; the resampling is keyed by name and seed.

    Where `exact` is 0 or 1 on every task, resampling says nothing of the unseen: its bound is then the rule of three,
    3/n (Hanley and Lippman-Hand 1983).
    """
    values = np.asarray(by_task, dtype=np.float64)
    mean = float(values.mean())
    if values.min() == values.max():
        reach = 3 / len(values) if name == "exact" else 0.0
        return Estimate(mean, max(0.0, mean - reach) if mean == 1 else mean, min(1.0, reach) if mean == 0 else mean)
    generator = np.random.Generator(np.random.PCG64(integer(2**63, seed, "bootstrap", name)))
    means = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(mean, float(low), float(high))


class NothingToJudge(MrlmError):
    """Every held-out episode failed."""


class Plays(Protocol):
    """What makes episodes of tasks: a policy's Rollout, or a scripted one."""

    def episodes(self, tasks: Sequence[Task], samples: int, draw: Draw, temperature: float) -> list[Episode]:
        """`samples` episodes of each task."""


def evaluate(
    rollout: Plays,
    environments: Mapping[str, Environment],
    settings: Evaluate,
    *,
    split: Split,
    seed: int,
    step: int,
    checkpoint: str,
    findings: Mapping[str, float] | None = None,
) -> tuple[Evaluation, list[Episode]]:
    """Evaluate the policy that the rollout's engine holds. Raises NothingToJudge if every episode failed.

    `findings` are passed on. Draws depend on the split, not on the step, so that two evaluations of a run differ by the
    policy alone.
    """
    begun = time.perf_counter()
    tasks = held_out(environments, split, settings.tasks)
    episodes = rollout.episodes(tasks, settings.episodes_per_task, Draw(seed, split, 0, step), settings.temperature)
    good = [one for one in episodes if one.stop != "failed"]
    if not good:
        raise NothingToJudge(f"every held-out episode failed; the first: {episodes[0].failure}")
    by_task: dict[str, list[Episode]] = {}
    for one in good:
        by_task.setdefault(f"{one.task.env}/{one.task.id}", []).append(one)
    rewards = {task: _mean([sum(one.rewards) for one in ones]) for task, ones in by_task.items()}
    components = _components(by_task, environments)
    by_agent: dict[str, list[Episode]] = {}
    for one in good:
        environment = environments[one.task.env]
        if len(environment.roles(environment.config)) > 1:
            by_agent.setdefault(f"{one.task.env}/{one.agent}", []).append(one)
    evaluation = Evaluation(
        checkpoint=checkpoint,
        step=step,
        split=split,
        tasks=len(by_task),
        failed=len(episodes) - len(good),
        reward=interval(list(rewards.values()), "reward", seed),
        components={name: interval(values, name, seed) for name, values in components.items()},
        pass_at=_pass_at(_grouped(good), settings.episodes_per_task),
        length=_mean([len(one.chosen) for one in good]),
        truncated=_mean([one.stop in ("length", "turns") for one in good]),
        seconds=time.perf_counter() - begun,
        environments=_apart(by_task, environments, seed),
        agents={agent: _of_agent(ones, environments, seed) for agent, ones in by_agent.items()},
        findings=findings or {},
    )
    return evaluation, episodes


def component_sums(episode: Episode) -> dict[str, float]:
    """Sum over turns of each unweighted component that the episode's agent received."""
    sums: dict[str, float] = {}
    for agent, _, component, value in episode.transcript.rewards:
        if agent == episode.agent:
            sums[component] = sums.get(component, 0.0) + value
    return sums


def _grouped(episodes: Sequence[Episode]) -> dict[str, list[Episode]]:
    """Episodes by (task, agent)."""
    found: dict[str, list[Episode]] = {}
    for one in episodes:
        found.setdefault(one.group, []).append(one)
    return found


def _apart(
    by_task: Mapping[str, Sequence[Episode]], environments: Mapping[str, Environment], seed: int
) -> dict[str, dict[str, Estimate]]:
    """Components of each environment where there are several, and of the parts of mixtures as "environment/part"."""
    places: dict[str, dict[str, Sequence[Episode]]] = {}
    for task, ones in by_task.items():
        label = ones[0].task.env
        if len(environments) > 1:
            places.setdefault(label, {})[task] = ones
        if part := environments[label].part(ones[0].task):
            places.setdefault(f"{label}/{part}", {})[task] = ones
    return {
        place: {name: interval(values, name, seed) for name, values in _components(within, environments).items()}
        for place, within in sorted(places.items())
    }


def _of_agent(episodes: Sequence[Episode], environments: Mapping[str, Environment], seed: int) -> dict[str, Estimate]:
    """Reward and components of one agent's episodes."""
    by_task = _grouped(episodes)
    rewards = [_mean([sum(one.rewards) for one in ones]) for ones in by_task.values()]
    named = {"reward": rewards, **_components(by_task, environments)}
    return {name: interval(values, name, seed) for name, values in named.items()}


def _components(
    by_task: Mapping[str, Sequence[Episode]], environments: Mapping[str, Environment]
) -> dict[str, list[float]]:
    """component → its mean for each task, over the tasks whose environment declares it; not given counts as 0. What
    the recipe's rewards gave stands beside the components, as rewards/NAME."""
    found: dict[str, list[float]] = {}
    for ones in by_task.values():
        sums = [component_sums(one) for one in ones]
        scored = sorted({name for each in sums for name in each if name.startswith(PREFIX)})
        environment = environments[ones[0].task.env]
        for name in (*environment.declared(environment.config), *scored):
            found.setdefault(name, []).append(_mean([each.get(name, 0.0) for each in sums]))
    return found


def _pass_at(groups: Mapping[str, Sequence[Episode]], wanted: int) -> dict[int, float]:
    """Unbiased pass@k, 1 − C(n−c, k)/C(n, k), for k = 1, 2, 4 … n (Chen et al. 2021, "Evaluating large language
    models trained on code"), over the groups (task, agent) of which no episode failed."""
    if wanted < 2:
        return {}
    counts = [
        sum(component_sums(one).get("exact", 0.0) >= 1 for one in ones)
        for ones in groups.values()
        if len(ones) == wanted
    ]
    if not counts:
        return {}
    ks = sorted({1 << power for power in range(wanted.bit_length()) if 1 << power <= wanted} | {wanted})
    return {k: _mean([1 - comb(wanted - right, k) / comb(wanted, k) for right in counts]) for k in ks}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

"""What the episodes of a step say, as metrics and as rows to store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mrlm_cli.envs.base import Environment
from mrlm_cli.metrics import Sums
from mrlm_cli.records import Episode
from mrlm_cli.rewards.base import PREFIX
from mrlm_cli.training.evaluate import component_sums
from mrlm_cli.training.fitting import is_unfit
from mrlm_cli.training.rollout import UNSCORED


def episode_metrics(episodes: Sequence[Episode], environments: Mapping[str, Environment]) -> Sums:
    """Metrics of all that a step sampled, groups that are left out included; failed ones count only as failed."""
    sums = Sums()
    good = [one for one in episodes if one.stop != "failed"]
    excluded = [one for one in episodes if is_unfit(one)]
    sums.add("episodes", sum(one.left_out is None for one in good))
    sums.add("sampled_tokens", sum(len(one.chosen) for one in good))
    groups = {(one.attempt, one.group): one.left_out is not None for one in episodes}
    sums.add("groups", len(groups) - sum(groups.values()))
    sums.add("filtered_groups", sum(groups.values()))
    sums.add("refilled_groups", sum(attempt > 0 for attempt, _ in groups))
    sums.add("failed_rate", len(episodes) - len(good) - len(excluded), len(episodes))
    sums.add("excluded_rate", len(excluded), len(episodes))
    unscored = [one.failure for one in episodes if one.failure is not None and one.failure.startswith(UNSCORED)]
    for label, count in Counter(failure.removeprefix(UNSCORED).partition(":")[0] for failure in unscored).items():
        sums.add(f"failed/{label}", count)
    rewards = [sum(one.rewards) for one in good]
    if rewards and environments:
        mean = sum(rewards) / len(rewards)
        sums.add("reward_std", (sum((reward - mean) ** 2 for reward in rewards) / len(rewards)) ** 0.5)
    for one, reward in zip(good, rewards, strict=True):
        sums.add("length", len(one.chosen))
        sums.add("turns", sum(span.kind == "chosen" for span in one.spans))
        if one.task.env not in environments:  # a row of a dataset
            continue
        sums.add("reward", reward)
        sums.add("truncated_rate", float(one.stop in ("length", "turns")))
        received = component_sums(one)
        environment = environments[one.task.env]
        several = len(environment.roles(environment.config)) > 1
        for name in environment.declared(environment.config):
            sums.add(f"reward/{one.task.env}/{name}", received.get(name, 0.0))
            if several:
                sums.add(f"reward/{one.task.env}/{one.agent}/{name}", received.get(name, 0.0))
        for name in received:
            if name.startswith(PREFIX):
                sums.add(f"reward/{name.removeprefix(PREFIX)}", received[name])
        for name, value in one.transcript.facts.items():
            sums.add(f"fact/{one.task.env}/{name}", value)
    return sums


def unknown_share(episodes: Sequence[Episode], tokenizer: Any, said: bool) -> float:
    """Share of unknown tokens in what the policy is given, in replies too if `said`; 0 for a tokenizer without one.

    Families in which the unknown token is the end or the padding as well have no unknown text.
    """
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        return 0.0
    given = [
        token
        for one in episodes
        for span in one.spans
        if said or span.kind != "chosen"
        for token in one.tokens[span.start : span.end]
    ]
    return given.count(unknown) / max(1, len(given))


def stored(episodes: Sequence[Episode], count: int) -> list[dict[str, Any]]:
    """`count` episodes, evenly spaced over the step, as JSON-able rows."""
    count = min(count, len(episodes))
    return [asdict(episodes[number * len(episodes) // count]) for number in range(count)]

"""One session in which a person is the policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mrlm_cli.envs.host import Host
from mrlm_cli.errors import SessionFailure
from mrlm_cli.records import Message, Reply, Task, Turn


class Person(Protocol):
    """Shows and asks."""

    def see(self, agent: str, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> None:
        """Messages for the agent whose part the person plays, and the tools that a chat template would show it."""

    def earned(self, rewards: Mapping[str, Mapping[str, float]], facts: Mapping[str, float]) -> None:
        """What the last reply earned, unweighted, by agent and component."""

    def say(self, agent: str) -> str | None:
        """The person's reply; None to leave."""


@dataclass(frozen=True, slots=True)
class Played:
    """How a session ended."""

    turns: int
    finished: bool  # the session came to its end; else the person left
    components: Mapping[str, Mapping[str, float]]  # {agent: {component: sum over turns}}
    reward: Mapping[str, float]  # {agent: weighted sum}
    right: str | None  # what would have been exactly right, where it is known


def play(host: Host, task: Task, seed: int, person: Person) -> Played:
    """Play the task to its end. Raises SessionFailure if the environment breaks."""
    environment = host.environments[task.env]
    weights = environment.reward_weights(environment.config)
    sums: dict[str, dict[str, float]] = {agent: {} for agent in environment.roles(environment.config)}
    name, turns = f"play/{task.id}", 0
    turn = _turn(host.collect(host.open([(name, task, seed)]))[name])
    try:
        while True:
            for agent, components in turn.rewards.items():
                for component, value in components.items():
                    sums[agent][component] = sums[agent].get(component, 0.0) + value
            if turns:
                person.earned(turn.rewards, turn.facts)
            person.see(turn.agent, turn.messages, turn.tools)
            text = None if turn.done else person.say(turn.agent)
            if text is None:
                break
            reply = Reply(Message("assistant", text), "end")
            turn = _turn(host.collect(host.step([(name, reply)]))[name])
            turns += 1
    finally:
        host.close([name])
    answer = environment.oracle(task)
    return Played(
        turns=turns,
        finished=turn.done,
        components=sums,
        reward={
            agent: sum(weights[each] * value for each, value in components.items())
            for agent, components in sums.items()
        },
        right=answer if answer is None or isinstance(answer, str) else "\n".join(answer),
    )


def _turn(outcome: Turn | SessionFailure) -> Turn:
    if isinstance(outcome, SessionFailure):
        raise outcome
    return outcome

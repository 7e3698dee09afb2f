"""What an environment is: tasks by split and index, sessions in message space. `recipes/my_env.py` is an example."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from mrlm_cli.records import Message, Reply, Split, Task, Turn
from mrlm_cli.strict import EnvironmentSettings as EnvironmentSettings


class Session(Protocol):
    """One episode, used once."""

    def start(self) -> Turn:
        """What the first agent sees."""

    def step(self, reply: Reply) -> Turn:
        """What follows the reply of the agent whose turn it was."""

    def close(self) -> None:
        """Called once, also after a failure."""


class Player(Protocol):
    """Speaks for a scripted agent in one session. A class that a recipe names is made as `Class(task, agent, seed)`.

    It runs in a worker process under hardware.deadline, unless it is a built-in environment's own; what it raises, and
    a deadline that it misses, fails the session.
    """

    def reply(self, view: Sequence[Message]) -> str:
        """The agent's next reply; `view` is all that it saw and said, in order."""


@dataclass(frozen=True, slots=True)
class Question:
    """How likely is it that the policy, having seen and said `view`, answers with `reply` and ends?"""

    view: tuple[Message, ...]  # assistant messages in it are the policy's own; the last one is not
    reply: str


class Environment(ABC):
    """Base class of environments. Instances are cheap, pure and hold only their settings.

    `components` maps the reward components to their default weights in the training reward; `exact` (1 for a fully
    right answer, else 0) is the headline of evaluations and by custom has weight 0 there unless it is the reward.
    `audited` is True only for the built-in environments: they run in the trainer's process, all others in worker
    processes with a deadline. `held_out` is False only where splits share tasks on purpose, because there is nothing
    to generalise to: evaluations then measure skill at what was trained.

    `single_reply` is True where a session is over after one reply; it is not inherited, as a subclass may ask for more.

    Where settings decide the components, override `declared`.

    `agents` are the roles of a session, where settings do not decide them (then override `roles`); `players` names the
    scripted ones that `player` makes. Give each role all that it must know: it sees its own view alone.
    """

    class Config(EnvironmentSettings):
        """No further settings."""

    components: ClassVar[dict[str, float]] = {}
    agents: ClassVar[tuple[str, ...]] = ("policy",)
    players: ClassVar[tuple[str, ...]] = ()
    audited: ClassVar[bool] = False
    held_out: ClassVar[bool] = True
    single_reply: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def size(self, split: Split) -> int | None:
        """Tasks in a split; None if there is no end to them."""

    @abstractmethod
    def task(self, split: Split, index: int) -> Task:
        """The task; a pure function of its arguments and the settings. Splits are disjoint, also under symmetries."""

    @abstractmethod
    def open(self, task: Task, seed: int) -> Session:
        """A new session of the task."""

    @property
    def in_process(self) -> bool:
        """Whether sessions with these settings may run in the trainer's process; only `audited` ones ever do."""
        return self.audited

    @property
    def journalled(self) -> bool:
        """Whether clocks or servers decide what its sessions in worker processes answer, so that a run's journal keeps
        the answers, and a resume repeats them instead of asking again."""
        return False

    @property
    def judging_seconds(self) -> float | None:
        """Seconds for judging a reply in a worker process, for one-turn environments whose own checker a reply may keep
        busy for ever; None where there is no such checker.

        A reply that takes longer is put to the proof: if the oracle's reply to the same task is judged in time, the
        reply is wrong (every component 0, fact `hung` 1), or a policy could have its wrong answers left out by hanging
        the checker; otherwise the session fails. Needs an `oracle` and a single agent.
        """
        return None

    def oracle(self, task: Task) -> str | Sequence[str] | None:
        """The exactly right reply, or one for every turn; None where it is not known. It must earn `exact`."""
        return None

    def canonical(self, task: Task) -> str:
        """Equal for tasks that are the same but for a symmetry, by default for equal data; splits share none."""
        return json.dumps(task.data, sort_keys=True)

    def part(self, task: Task) -> str:
        """Which part of a mixture the task is of: evaluations show each part beside the whole. Empty if of none."""
        return ""

    def close(self) -> None:  # noqa: B027  (most environments have nothing to give back)
        """Called once at a run's end, after its worker processes are gone: remove what outlives them."""

    def player(self, name: str, task: Task, agent: str, seed: int) -> Player:
        """The scripted player called `name`, one of `players`, for one agent of one session."""
        raise ValueError(f"{self.config.label} has no player {name!r}")

    def questions(self) -> Sequence[Question]:
        """What an evaluation asks the policy for `findings`; by default nothing."""
        return ()

    def findings(self, probabilities: Sequence[float]) -> Mapping[str, float]:
        """Numbers about the policy that follow from its exact answers to `questions`, for the evaluation's report."""
        return {}

    @classmethod
    def roles(cls, config: Any) -> tuple[str, ...]:
        """The agents of a session under these settings."""
        return cls.agents

    @classmethod
    def declared(cls, config: Any) -> Mapping[str, float]:
        """The reward components under these settings with their default weights; `components`, if not overridden."""
        return cls.components

    @classmethod
    def replies(cls, config: Any, agent: str) -> tuple[str, int] | None:
        """(setting, replies of this agent that it takes), which sampling.max_turns must not cut short; None if none."""
        return None

    @classmethod
    def reward_weights(cls, config: EnvironmentSettings) -> dict[str, float]:
        """Weight of every component: the declared defaults with the recipe's `rewards` over them."""
        return {**cls.declared(config), **config.rewards}

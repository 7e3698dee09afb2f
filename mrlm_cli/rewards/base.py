"""What a reward is: finished sessions in, a number for each agent out. `recipes/my_reward.py` is the short form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mrlm_cli.records import Transcript
from mrlm_cli.strict import RewardSettings as RewardSettings

PREFIX = "rewards/"  # a transcript's component "rewards/NAME" was given by the recipe's reward NAME


class ModelSettings(RewardSettings):
    """Where a reward runs a model of its own."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model runs."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of its matrix products."""
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """Threads of torch in a worker process; other numbers give other bits."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A session could not be scored; its episodes count as failed, never as wrong."""

    text: str


Outcome = Mapping[str, float] | Failure


class Reward(ABC):
    """Base class of rewards. Instances live in worker processes, where a hang or crash costs one session.

    `at_once` transcripts are given to one call of `score`; a call that fails fails them all, so 1 is right for what
    only computes. `remote` is True for what may answer otherwise when it is asked again: its answers are then kept in
    the run's journal, so that a resume repeats them.
    """

    class Config(RewardSettings):
        """No further settings."""

    remote: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def at_once(self) -> int:
        """Transcripts in one call of `score`."""
        return 1

    def prepare(self) -> None:  # noqa: B027  (most rewards have nothing to load)
        """Called once in a worker process, before the first `score`: load here what is heavy."""

    def fingerprint(self) -> str | None:
        """A hash of the files that decide its values, so that a resume notices when they changed; None: there are none.

        Asked for in the main process, without `prepare`.
        """
        return None

    @abstractmethod
    def score(self, transcripts: Sequence[Transcript]) -> Sequence[Mapping[str, Any] | Failure]:
        """{agent: value} or a Failure for each transcript, in their order."""


class TextReward(Reward):
    """A reward that looks at one agent's replies at a time, and gives every agent its own value."""

    def score(self, transcripts: Sequence[Transcript]) -> list[Mapping[str, float]]:
        """`value` for every agent of every transcript."""
        return [{agent: self.value(one, said(one, agent)) for agent in one.views} for one in transcripts]

    @abstractmethod
    def value(self, transcript: Transcript, replies: Sequence[str]) -> float:
        """What one agent's replies are worth; there may be none."""


def said(transcript: Transcript, agent: str) -> list[str]:
    """The replies of an agent, in their order."""
    return [message.content for message in transcript.views[agent] if message.role == "assistant"]

"""The section `agents`: who speaks for each role of an environment with several. A role without an entry learns."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mrlm_cli.recipe.sections import Chat
from mrlm_cli.strict import Names, Strict, Strings


class Learner(Strict):
    """The policy that is trained; several such roles share it, and that is self-play."""

    type: Literal["learner"]
    """The role learns: what it sees and says becomes episodes."""


class Frozen(Strict):
    """A policy whose weights never move, with an engine of its own. What it says is stored and never trained on."""

    type: Literal["frozen"]
    """The role is played by a fixed policy."""
    path: Annotated[str | None, Names("model")] = None
    """A model's, run's or checkpoint's directory, a `.gguf` file or a hub id; by default the policy as it started."""
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    """Sampling temperature, 0 is greedy; by default sampling.temperature. The same in training and evaluation."""
    max_new_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Tokens of one reply, by default sampling.max_new_tokens; a reply cut here is the environment's to judge."""
    stop: Strings = ()
    """Strings that end a reply, with the token that completes one of them."""
    chat: Chat | None = None
    """How its messages become tokens; by default as model.chat says."""


class Scripted(Strict):
    """A program. What it says is stored and never trained on."""

    type: Literal["scripted"]
    """The role is played by a program."""
    player: str
    """A player that the environment has by this name, or ./file.py:Class, made as Class(task, agent, seed)."""


class Scorer(Strict):
    """One of the recipe's rewards, asked in the middle of a session: the role's reply is the number that the reward
    gives to what the role is shown."""

    type: Literal["scorer"]
    """The role is played by a reward."""
    reward: str
    """The reward's name in `rewards`; a weight of 0 there keeps it out of what is learnt from at the end."""


Agent = Annotated[Learner | Frozen | Scripted | Scorer, Field(discriminator="type")]
AGENTS: dict[str, type[Learner] | type[Frozen] | type[Scripted] | type[Scorer]] = {
    "learner": Learner,
    "frozen": Frozen,
    "scripted": Scripted,
    "scorer": Scorer,
}

"""Scripted players that nobody audited run in worker processes: each is the environment of sessions of its own.

    start()                           the player is made
    step(what its agent saw since)    its reply, as the one message of a turn

So the deadline, the rebuilding after a kill and the journal of environments hold for players too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mrlm_cli.envs.base import Environment, EnvironmentSettings, Player
from mrlm_cli.errors import SessionFailure
from mrlm_cli.records import Message, Reply, Split, Task, Turn
from mrlm_cli.registry import resolve


def heard(messages: Sequence[Message]) -> Reply:
    """What the agent saw, as what is said to a Playing session."""
    return Reply(Message("user", json.dumps([asdict(message) for message in messages])), "end")


def label(role: str, environment: str) -> str:
    """The name of a role's player in an environment."""
    return f"player {role} of {environment}"


class Playing(Environment):
    """Sessions whose every turn is a player's reply."""

    class Config(EnvironmentSettings):
        """Which player, of which environment's agent."""

        player: str
        """A player that the environment has by this name, or ./file.py:Class."""
        role: str
        """The agent that it speaks for."""
        environment: str
        """The environment's type."""
        settings: str
        """The environment's settings as JSON."""
        folders: list[str]
        """Where ./file.py is looked for."""

    config: Config

    @cached_property
    def _played(self) -> Environment:
        found = resolve("environments", self.config.environment, self._folders)
        made: Environment = found(found.Config.model_validate_json(self.config.settings))
        return made

    @property
    def _folders(self) -> list[Path]:
        return [Path(folder) for folder in self.config.folders]

    def size(self, split: Split) -> int:
        """It has no tasks of its own."""
        return 0

    def task(self, split: Split, index: int) -> Task:
        """Raises ValueError: a session of a player is opened with the task of its environment."""
        raise ValueError("a player has no tasks of its own")

    def open(self, task: Task, seed: int) -> PlayingSession:
        """A new player."""
        played, name = self._played, self.config.player
        task = replace(task, env=played.config.label)
        if name in played.players:
            return PlayingSession(played.player(name, task, self.config.role, seed))
        return PlayingSession(resolve("players", name, self._folders)(task, self.config.role, seed))


class PlayingSession:
    """One player at work."""

    def __init__(self, player: Player) -> None:
        self._player = player
        self._view: list[Message] = []

    def start(self) -> Turn:
        """Nothing is to be said yet."""
        return Turn()

    def step(self, reply: Reply) -> Turn:
        """The player's reply to what it heard. Raises SessionFailure if that is no text."""
        fields: list[dict[str, Any]] = json.loads(reply.message.content)
        self._view += [Message(**{**each, "tool_calls": tuple(each["tool_calls"])}) for each in fields]
        text = self._player.reply(tuple(self._view))
        if not isinstance(text, str):
            raise SessionFailure(f"a scripted player must reply with a string, not {type(text).__name__}")
        self._view.append(Message("assistant", text))
        return Turn(messages=(self._view[-1],))

    def close(self) -> None:
        """Nothing is held."""

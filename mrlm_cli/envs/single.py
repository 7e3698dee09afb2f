"""Sessions of one question and one reply."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mrlm_cli.records import Message, Reply, Turn

Score = Callable[[Reply], tuple[Mapping[str, float], Mapping[str, float]]]


class SingleReply:
    """Shows `prompt` as a user message, scores one reply of the policy, and is done.

    `score(reply)` gives ({component: value}, {fact: value}).
    """

    def __init__(self, prompt: str, score: Score) -> None:
        self._prompt = prompt
        self._score = score

    def start(self) -> Turn:
        """The question."""
        return Turn(messages=(Message("user", self._prompt),))

    def step(self, reply: Reply) -> Turn:
        """The rewards; the session is over."""
        components, facts = self._score(reply)
        return Turn(rewards={"policy": components}, facts=facts, done=True)

    def close(self) -> None:
        """Nothing is held."""

"""Guess a number: `1-32?` is answered by `16`, which is answered by `<`, and so on until the secret is named."""

from __future__ import annotations

import math
import re
from functools import cache
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from mrlm_cli.envs.base import Environment
from mrlm_cli.records import Message, Reply, Split, Task, Turn
from mrlm_cli.strict import EnvironmentSettings

GAMES = 1024  # training tasks of every secret, so that the tasks of one step differ


class Guess(Environment):
    """Find a secret number in few guesses.

    The environment answers `<` (the secret is smaller), `>` (larger) or `?` (the reply was no number of the range);
    naming the secret ends the game, and so does the last allowed guess.

    Components: `win`; `cost`, 1 for every miss; `wasted`, 1 for a guess that an answer before had ruled out (it costs
    the best policy nothing, and tells a beginner what the answers mean); `narrowed`, the share of the secret's bits
    that an answer told, log(numbers possible before / after) / log(numbers in the range), which adds up to 1 in every
    won game and so pays for good questions at once without favouring any way to win (Ng, Harada & Russell 1999; weight
    0 unless the recipe gives it one); `invalid`, for every reply that is no number of the range, 1 plus the share of
    its characters that are not digits, so that a policy without any idea is led to digits; `exact`, 1 for a win. A
    reply cut by the length limit ends the episode: it is worse by 1 than one that ended, or ending would not be learnt,
    and counts for every guess that was left, or breaking off would pay better than guessing.
    Fact: `guesses`, used in a won game.

    There is nothing to generalise to: a game has as few states as the range has numbers, and one never trained on
    could not be won by any policy. So validation and test play the same secrets as training, once each, and measure
    skill; `held_out` is False to say so.
    """

    class Config(EnvironmentSettings):
        """The range and the patience."""

        low: Annotated[int, Field(ge=0, le=9998)] = 1
        """Smallest secret."""
        high: Annotated[int, Field(ge=1, le=9999)] = 32
        """Largest secret."""
        guesses: Annotated[int, Field(ge=1, le=100)] = 6
        """Guesses allowed; bisection needs at most log2(range) + 1. Keep sampling.max_turns at or above it."""

        padded: bool = False
        """Ask for numbers as wide as the largest, such as 04, and count others as invalid; otherwise zeros are free. A
        model that learns from nothing needs it, or it settles on the shorter numbers that it can end by chance."""

        @model_validator(mode="after")
        def _fits(self) -> Guess.Config:
            if self.low >= self.high:
                raise ValueError(f"low ({self.low}) must be below high ({self.high})")
            return self

    components: ClassVar[dict[str, float]] = {
        "win": 1.0,
        "cost": -0.1,
        "wasted": -0.1,
        "narrowed": 0.0,
        "invalid": -0.2,
        "exact": 0.0,
    }
    audited: ClassVar[bool] = True
    held_out: ClassVar[bool] = False
    config: Config

    @classmethod
    def replies(cls, config: Any, agent: str) -> tuple[str, int]:
        """Every guess is a reply."""
        return "guesses", config.guesses

    def size(self, split: Split) -> int:
        """Games in the split: every secret once, in training many times."""
        return (self.config.high - self.config.low + 1) * (GAMES if split == "train" else 1)

    def task(self, split: Split, index: int) -> Task:
        """Game number `index` of the split. Raises ValueError outside range(size)."""
        if not 0 <= index < self.size(split):
            raise ValueError(f"{split} has no task {index}")
        game, secret = divmod(index, self.config.high - self.config.low + 1)
        data = {"secret": self.config.low + secret, "game": game}
        return Task(f"{split}/{index}", self.config.label, split, index, data)

    def open(self, task: Task, seed: int) -> GuessSession:
        """A game; nothing depends on the seed."""
        return GuessSession(self.config, task.data["secret"])

    def oracle(self, task: Task) -> str:
        """The secret, which wins at once."""
        return f"{task.data['secret']:0{len(str(self.config.high))}}"

    def canonical(self, task: Task) -> str:
        """The secret."""
        return str(task.data["secret"])


class GuessSession:
    """One game."""

    def __init__(self, config: Guess.Config, secret: int) -> None:
        self._config = config
        self._secret = secret
        self._used = 0
        self._possible = range(config.low, config.high + 1)

    def start(self) -> Turn:
        """The range."""
        return Turn(messages=(Message("user", f"{self._config.low}-{self._config.high}?"),))

    def step(self, reply: Reply) -> Turn:
        """Smaller, larger, not a guess, or the end."""
        left = self._config.guesses - self._used
        self._used += 1
        if reply.stop == "length":
            return self._turn("", done=True, invalid=left * (1.0 + _strangeness(reply.message.content)))
        guess = _number(reply.message.content, self._config)
        if guess is None:
            return self._turn("?", done=left == 1, invalid=_strangeness(reply.message.content))
        if guess == self._secret:
            return self._turn("", done=True, win=1.0, exact=1.0, narrowed=self._narrow(guess, guess + 1))
        wasted = float(guess not in self._possible)
        answer = "<" if self._secret < guess else ">"
        low, high = self._possible.start, self._possible.stop
        narrowed = self._narrow(low, min(high, guess)) if answer == "<" else self._narrow(max(low, guess + 1), high)
        return self._turn(answer, done=left == 1, cost=1.0, wasted=wasted, narrowed=narrowed)

    def close(self) -> None:
        """Nothing is held."""

    def _narrow(self, low: int, high: int) -> float:
        """Only range(low, high) is still possible: the share of the secret's bits that this tells."""
        before, self._possible = len(self._possible), range(low, high)
        return math.log(before / len(self._possible)) / math.log(self._config.high - self._config.low + 1)

    def _turn(self, answer: str, *, done: bool, **components: float) -> Turn:
        messages = () if done else (Message("user", answer),)
        facts = {"guesses": float(self._used)} if "win" in components else {}
        return Turn(messages=messages, rewards={"policy": components}, done=done, facts=facts)


def _number(text: str, config: Guess.Config) -> int | None:
    """The guess, if the text is a number of the range, with no more digits than the largest."""
    text = text.strip()
    widest = len(str(config.high))
    narrowest = widest if config.padded else 1
    if not re.fullmatch(f"[0-9]{{{narrowest},{widest}}}", text):  # ASCII alone, and short before int() sees it
        return None
    guess = int(text)
    return guess if config.low <= guess <= config.high else None


def _strangeness(text: str) -> float:
    """How far an invalid reply is from being digits: from 1 for digits alone to 2 for none of them."""
    return 2.0 - sum(character in "0123456789" for character in text) / max(1, len(text))


def binary_search_return(config: Guess.Config) -> float:
    """Mean return over all secrets of bisection: the most that a policy can get under the default kind of weights."""
    weights = Guess.reward_weights(config)
    total = 0.0
    for secret in range(config.low, config.high + 1):
        misses = _bisection_misses(config.low, config.high, secret)
        total += weights["cost"] * min(misses, config.guesses)
        total += (weights["win"] + weights["exact"]) * (misses < config.guesses)
    return total / (config.high - config.low + 1)


@cache
def _bisection_misses(low: int, high: int, secret: int) -> int:
    middle = (low + high) // 2
    if secret == middle:
        return 0
    return 1 + (
        _bisection_misses(low, middle - 1, secret) if secret < middle else _bisection_misses(middle + 1, high, secret)
    )

"""Games that draw from Python's and numpy's global generators: each session gets states of its own."""

from __future__ import annotations

import random
from types import TracebackType
from typing import Any


class OwnRandom:
    """While entered, the global generators are this session's; left, they are as they were.

        chance = OwnRandom(seed)
        with chance:
            game.step(action)       # random.random() goes on where this session's last call left it

    So sessions of one process see neither each other's draws nor the process's own. A generator that a game keeps for
    itself, the game must seed itself. Not for threads: they share the global generators.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._states: tuple[Any, Any] | None = None  # before it is first entered there is but the seed
        self._outside: tuple[Any, Any] | None = None

    def __enter__(self) -> None:
        self._outside = _states()
        if self._states is None:
            _seed(self._seed)
        else:
            _set(self._states)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._outside is not None
        self._states = _states()
        _set(self._outside)


def _states() -> tuple[Any, Any]:
    from numpy import random as numpy_random

    return random.getstate(), numpy_random.get_state()


def _seed(seed: int) -> None:
    """A hundredth of the time that it takes to make a generator for its state."""
    from numpy import random as numpy_random

    random.seed(seed)
    numpy_random.seed(seed % 2**32)


def _set(states: tuple[Any, Any]) -> None:
    from numpy import random as numpy_random

    random.setstate(states[0])
    numpy_random.set_state(states[1])

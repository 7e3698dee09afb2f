"""Policies that need no model: the environment's own answers, and chance. They test environments, not models."""

from __future__ import annotations

from collections.abc import Callable

from mrlm_cli.draws import draw_key, integer, uniforms
from mrlm_cli.envs.base import Environment
from mrlm_cli.errors import UnknownName, UserError
from mrlm_cli.records import Task

PREFIX = "scripted:"
MOST_OTHERS = 4096  # tasks of an endless split among which chance picks
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 +-*/=<>().,?!"

Script = Callable[[Environment, Task, int, bytes], str]
"""f(environment, task, turn, draw key) -> the reply of that turn."""


def script(name: str) -> Script:
    """The policy called `scripted:NAME`. Raises UnknownName."""
    known = {"oracle": oracle, "random": chance}
    found = known.get(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
    if found is None:
        raise UnknownName(f"there is no policy {name}; expected {' or '.join(PREFIX + each for each in known)}")
    return found


def oracle(environment: Environment, task: Task, turn: int, key: bytes) -> str:
    """What the environment says is right; the last of its replies again where a session goes on.

    Raises UserError if it does not know.
    """
    answer = environment.oracle(task)
    if answer is None:
        raise UserError(f"environment {environment.config.label} does not know the answer to its task {task.id}")
    return answer if isinstance(answer, str) else answer[min(turn, len(answer) - 1)]


def chance(environment: Environment, task: Task, turn: int, key: bytes) -> str:
    """The right reply to another task drawn from the split, so of the right form and blind to the question; random
    characters where right replies are not known."""
    size = environment.size(task.split) or MOST_OTHERS
    other = environment.task(task.split, integer(size, "other", key.hex(), turn))
    answer = environment.oracle(other)
    if answer is None:
        drawn = [uniforms(draw_key("letters", key.hex(), turn), place)[0] for place in range(16)]
        return "".join(_LETTERS[int(point * len(_LETTERS))] for point in drawn)
    return answer if isinstance(answer, str) else answer[min(turn, len(answer) - 1)]

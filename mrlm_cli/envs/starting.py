"""Time in which something that a session needs is started, such as a tool's process: no deadline of a reply counts it.

A worker process tells its parent by frames before the answer, {"starting": seconds} and {"started": true}, and in
between the parent's clock rests, for no longer than it is told.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

_MARGIN = 5.0  # seconds by which the parent waits longer, so that who starts something says itself what was late


class _Here:
    """What this process knows of its own starts."""

    def __init__(self) -> None:
        self.spent = 0.0
        self.tell: Callable[[Mapping[str, Any]], None] = lambda fields: None


_here = _Here()


def tell_parent(tell: Callable[[Mapping[str, Any]], None]) -> None:
    """Tell of every start by `tell`, which sends a frame."""
    _here.tell = tell


@contextmanager
def starting(seconds: float) -> Iterator[None]:
    """Inside, something is started that gives up after so many seconds by itself. From the main thread only."""
    begun = time.monotonic()
    _here.tell({"starting": seconds})
    try:
        yield
    finally:
        _here.spent += time.monotonic() - begun
        _here.tell({"started": True})


def working_time() -> float:
    """A clock in seconds that rests while something is started."""
    return time.monotonic() - _here.spent


class Deadline:
    """A parent's clock over one answer."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds
        self._rest: tuple[float, float] | None = None  # since when it rests, and until when at most

    def left(self) -> float:
        """Seconds until it is too late."""
        now = time.monotonic()
        if self._rest is None:
            return self._until - now
        return self._rest[1] - now

    def heeds(self, fields: Mapping[str, Any]) -> bool:
        """Whether a frame is meant for the clock, and not the answer."""
        now = time.monotonic()
        if "starting" in fields:
            self._rest = now, now + fields["starting"] + _MARGIN
        elif "started" in fields and self._rest is not None:
            self._until += now - self._rest[0]
            self._rest = None
        else:
            return False
        return True

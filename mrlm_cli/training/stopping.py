"""Signals: the first asks for a stop at the next safe point, a second SIGINT aborts at once."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class StopRequested(Exception):
    """Raised in a rollout or an evaluation by `Stopper.check`; the step under way is given up and repeated later."""


class Stopper:
    """Context manager that takes SIGINT and SIGTERM while it is open."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopper:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number

    def check(self) -> None:
        """Raise StopRequested if a signal came."""
        if self.signal_number is not None:
            raise StopRequested

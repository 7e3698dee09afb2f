"""How many of the last sessions failed, so that a run can stop and say why."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

WINDOW = 256  # sessions, over all rollouts and evaluations of a process
LEAST = 32  # a shorter past counts as if so many had gone well: a handful of failures in few sessions says little


class Failures:
    """The last WINDOW sessions of one environment or reward. A resumed run begins with none."""

    def __init__(self, share: float) -> None:
        self._share = share  # that may fail
        self._last: deque[str | None] = deque(maxlen=WINDOW)

    def add(self, failures: Iterable[str | None]) -> None:
        """Why each session failed; None for one that did not."""
        self._last.extend(failures)

    @property
    def too_many(self) -> str | None:
        """In words, if more failed than may."""
        failed = [text for text in self._last if text is not None]
        if len(failed) <= self._share * max(len(self._last), LEAST):
            return None
        return (
            f"failed on {len(failed)} of the last {len(self._last)} sessions, more than max_failed ({self._share:g}) "
            f"allows; the last: {failed[-1]}"
        )

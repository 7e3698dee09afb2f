"""How long a run will still take."""

from __future__ import annotations

from collections import deque

_WINDOW = 100  # steps; wide enough to hold evaluations and checkpoints in their share


class Pace:
    """Wall time per step over the last steps, evaluations and checkpoints included."""

    def __init__(self, now: float) -> None:
        self._times = deque([now], maxlen=_WINDOW + 1)

    def stepped(self, now: float) -> None:
        """A step is done at time `now`, in seconds of a monotonic clock."""
        self._times.append(now)

    def left(self, steps: int) -> float | None:
        """Seconds that `steps` more steps will take; None before the first step."""
        done = len(self._times) - 1
        return (self._times[-1] - self._times[0]) / done * steps if done else None

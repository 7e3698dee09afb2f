"""Whether other processes hold the cores that a run computes on, its own workers among them.

torch's threads meet at a barrier after every parallel piece of work, and spin there. While a neighbour holds one of
their cores, all wait for the thread that does not run: a step may take ten times as long. The kernel counts for every
thread how long it was ready to run and had no core; that time, as a share of the clock's, is what is judged here. A
step that is long because it does much waits for nobody and raises no alarm.

Not covered: systems other than Linux, and time that a hypervisor takes away unseen by its guest's scheduler.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

WINDOW = 10.0  # seconds that are judged together at least: a short burst is no reason for a warning
SHARE = 0.2  # of the clock's seconds, summed over the threads; undisturbed runs stay far below a twentieth
SILENCE = 600.0  # seconds between two warnings at least

_TASKS = Path("/proc/self/task")


class Contention:
    """Looks back after every step; reads no more than every WINDOW seconds, and touches nothing of torch."""

    def __init__(
        self,
        threads: int,
        waited: Callable[[], Mapping[int, float]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._threads = threads
        self._waited = waited or waited_for_a_core
        self._clock = clock
        self._since = clock()
        self._before = self._waited()
        self._told: float | None = None

    def look(self) -> str | None:
        """What to tell a person, if there is something to tell."""
        now = self._clock()
        seconds = now - self._since
        if seconds < WINDOW:
            return None
        waited = self._waited()
        share = sum(each - self._before.get(thread, 0.0) for thread, each in waited.items()) / seconds
        self._since, self._before = now, waited
        if share < SHARE or (self._told is not None and now - self._told < SILENCE):
            return None
        self._told = now
        fewer = f", or start with hardware.threads={self._threads - 1} (a run keeps its number)"
        return (
            "other programs, or the run's own worker processes, hold its cores: of the last "
            f"{seconds:.0f} s its threads waited {share * seconds:.0f} s for one, and where one thread waits all do; "
            "end what else runs here" + (fewer if self._threads > 1 else "")
        )


def waited_for_a_core(tasks: Path = _TASKS) -> dict[int, float]:
    """{thread of this process: seconds for which it was ready to run and had no core}; empty where none is counted."""
    found: dict[int, float] = {}
    for task in tasks.glob("*/schedstat"):
        try:
            _, waited, _ = task.read_text().split()
        except OSError:  # the thread has ended meanwhile
            continue
        found[int(task.parent.name)] = int(waited) / 1e9
    return found

"""Whether a step takes longer than the run's own steps took for the same work.

A run is its own yardstick: each phase of a step is compared with the median of earlier ones that had as much to do, so
that longer answers, more prompts or another number of optimizer steps are no reason for a warning; evaluations,
checkpoints and the waiting for environments and rewards are in no phase. What is told is a series of slow steps, once:
again only after a step that was not slow.

Not covered: a machine that was as busy from the start as it is now (`contention` asks the kernel about that), and steps
whose work is like that of too few others. The clock decides what is said, never what is trained.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from mrlm_cli.records import Episode
from mrlm_cli.training.collate import trainable

ALIKE = 1.25  # two phases have the same work if none of their counts differs by more than this factor
SLOWER = 1.6  # times the median; what grows with the square of a count may honestly be ALIKE² = 1.5625 times as slow
ENOUGH = 5  # phases of the same work that make a yardstick
LOST = 2.0  # seconds that a series of slow steps must have cost before anyone is told
KEPT = 64  # phases remembered


@dataclass(frozen=True, slots=True)
class Phase:
    """What one phase of a step took, in seconds, and how much there was to do, as positive counts."""

    name: str
    seconds: float
    work: tuple[int, ...]


def phases(
    episodes: Sequence[Episode], decoding_seconds: float, update_seconds: float, optimizer_steps: int, value_only: bool
) -> list[Phase]:
    """The phases of a step that wait for nobody: decoding, if there was any, and the update, if one was made."""
    found = []
    if decoding_seconds > 0:
        found.append(Phase("sampling", decoding_seconds, _counts([(len(one.chosen), one) for one in episodes])))
    if optimizer_steps > 0:
        trained = [(len(one.tokens), one) for one in episodes if trainable(one)]
        name = "value update" if value_only else "update"
        found.append(Phase(name, update_seconds, (optimizer_steps, *_counts(trained))))
    return found


def _counts(rows: Sequence[tuple[int, Episode]]) -> tuple[int, ...]:
    """Tokens of the phase, those of its longest row, and all that the episodes hold."""
    return (
        sum(count for count, _ in rows),
        max((count for count, _ in rows), default=0),
        sum(len(one.tokens) for _, one in rows),
    )


class Calibration:
    """The yardstick of every phase of a run; it starts anew in every process."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._known: dict[str, deque[Phase]] = {}
        self._lost = 0.0  # seconds that the present series of slow steps has cost
        self._told = False  # of that series

    def look(self, step: int, done: Sequence[Phase]) -> str | None:
        """What to tell a person about the phases of a step, if there is something to tell."""
        judged = [(phase, usual) for phase in done if (usual := self._usual(phase)) is not None]
        slow = [(phase, usual) for phase, usual in judged if phase.seconds > SLOWER * usual]
        for phase in done:
            if not any(phase is one for one, _ in slow):  # slow ones are no yardstick
                self._known.setdefault(phase.name, deque(maxlen=KEPT)).append(phase)
        if judged and not slow:
            self._lost, self._told = 0.0, False
        self._lost += sum(phase.seconds - usual for phase, usual in slow)
        if self._told or self._lost < LOST:
            return None
        self._told = True
        figures = " and ".join(
            f"the {phase.name} took {phase.seconds:.2g} s, {phase.seconds / usual:.1f} times the {usual:.2g} s"
            for phase, usual in slow
        )
        fewer = f", or start with hardware.threads={self._threads - 1} (a run keeps its number)"
        return (
            f"step {step}: {figures} of this run's earlier steps with as much to do; something slows the machine, such "
            "as other programs, the run's own worker processes, heat or a full memory; end what else runs here"
            + (fewer if self._threads > 1 else "")
        )

    def _usual(self, phase: Phase) -> float | None:
        """Median seconds of the same work; None while it was seen too seldom."""
        alike = [one.seconds for one in self._known.get(phase.name, ()) if _alike(one.work, phase.work)]
        return median(alike) if len(alike) >= ENOUGH else None


def _alike(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return all(a <= ALIKE * b and b <= ALIKE * a for a, b in zip(one, other, strict=True))

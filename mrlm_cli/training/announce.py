"""The border between a run and its listeners: what a listener throws is told once and cannot hurt the run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mrlm_cli.events import Evaluation, Listener
from mrlm_cli.records import Episode


class Announcer(Listener):
    """Passes every event on to all listeners; one that raises is dropped, with a line on stderr."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = list(listeners)

    def started(self, run: Path, recipe: Any, step: int, parameters: int) -> None:
        """See Listener."""
        self._tell(lambda each: each.started(run, recipe, step, parameters))

    def phase(self, name: str, done: int, total: int) -> None:
        """See Listener."""
        self._tell(lambda each: each.phase(name, done, total))

    def stepped(self, step: int, metrics: Mapping[str, float], episodes: Sequence[Episode]) -> None:
        """See Listener."""
        self._tell(lambda each: each.stepped(step, metrics, episodes))

    def evaluated(self, evaluation: Evaluation) -> None:
        """See Listener."""
        self._tell(lambda each: each.evaluated(evaluation))

    def saved(self, step: int, path: Path) -> None:
        """See Listener."""
        self._tell(lambda each: each.saved(step, path))

    def warned(self, text: str) -> None:
        """See Listener."""
        self._tell(lambda each: each.warned(text))

    def finished(self, step: int) -> None:
        """See Listener."""
        self._tell(lambda each: each.finished(step))

    def close(self) -> None:
        """See Listener."""
        self._tell(lambda each: each.close())

    def _tell(self, call: Callable[[Listener], None]) -> None:
        for each in list(self._listeners):
            try:
                call(each)
            except Exception as error:
                self._listeners.remove(each)
                print(f"the {type(each).__name__} display failed and is off: {error!r}", file=sys.stderr)

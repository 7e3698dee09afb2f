"""Exceptions of people's own code in worker processes: each told once, in a few lines, and kept whole in the run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from mrlm_cli import blame
from mrlm_cli.envs.wire import describe_exception

MOST = 20  # different exceptions that are told and kept


def trace(error: BaseException) -> dict[str, Any]:
    """What a worker process sends of an exception."""
    return {"failure": describe_exception(error), "lines": blame.lines(error), "whole": blame.whole(error)}


class Troubles:
    """Told by the threads of all workers. `keep` writes a traceback down and says where, or None if there is no run."""

    def __init__(self, keep: Callable[[str], Path | None]) -> None:
        self._keep = keep
        self._lock = Lock()
        self._told: set[str] = set()

    def tell(self, who: str, found: Mapping[str, Any]) -> None:
        """Print the text of an exception and its last lines, unless it was told before; `found` is of `trace`."""
        failure = found["failure"]
        with self._lock:
            if failure in self._told or len(self._told) >= MOST:
                return
            self._told.add(failure)
            place = self._keep(f"{who}: {found['whole']}\n")
            rest = "--debug prints the whole traceback" if place is None else f"the whole traceback is in {place}"
            told = found["whole"].rstrip().splitlines() if blame.debug else [*found["lines"], rest]
            print(f"{who}: {failure}", *(f"  {line}" for line in told), sep="\n", file=sys.stderr, flush=True)

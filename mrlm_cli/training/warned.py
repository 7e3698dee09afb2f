"""Warnings of a run, kept in its directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mrlm_cli.events import Listener
from mrlm_cli.training.rundir import RunDirectory


class KeptWarnings(Listener):
    """Writes every warning to warnings.jsonl; those that come before the directory is there wait for it."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._early: list[str] | None = []

    def started(self, run: Path, recipe: Any, step: int, parameters: int) -> None:
        """See Listener."""
        early, self._early = self._early or [], None
        for text in early:
            self._run.append_warning(text)

    def warned(self, text: str) -> None:
        """See Listener."""
        if self._early is None:
            self._run.append_warning(text)
        else:
            self._early.append(text)

"""What clocks and remote judges decided in a run, so that a replay decides the same: journal.jsonl."""

from __future__ import annotations

import json
import os
from pathlib import Path

from mrlm_cli.errors import RunDirectoryError
from mrlm_cli.training import durable


class Journal:
    """Failures by (session, turn), one line each, on the disk before `record` returns.

    A line torn by a kill is dropped: its decision was not yet acted upon. The journal survives a rewind.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._whole_bytes = 0
        self._read: dict[tuple[str, int], str] | None = None

    @property
    def _decided(self) -> dict[tuple[str, int], str]:
        """Read at first use, which is under the run's lock: before it, another process may still write."""
        if self._read is None:
            self._read = {}
            for number, line in enumerate(durable.whole_lines(self._path), start=1):
                try:
                    row = json.loads(line)
                    self._read[row["session"], row["turn"]] = row["failure"]
                except (ValueError, KeyError, TypeError) as error:
                    raise RunDirectoryError(f"{self._path}:{number} is not a line of a journal") from error
                self._whole_bytes += len(line) + 1
        return self._read

    def recall(self, session: str, turn: int) -> str | None:
        """The failure that was recorded for this turn of this session, or None."""
        return self._decided.get((session, turn))

    def record(self, session: str, turn: int, failure: str) -> None:
        """Write a decision down. Raises ValueError if the turn was decided otherwise before, RunDirectoryError if the
        disk refuses."""
        known = self.recall(session, turn)
        if known == failure:
            return
        if known is not None:
            raise ValueError(f"session {session} turn {turn} failed as {known!r} before and cannot fail as {failure!r}")
        line = durable.json_line({"session": session, "turn": turn, "failure": failure})
        try:
            if self._path.exists() and self._path.stat().st_size > self._whole_bytes:
                os.truncate(self._path, self._whole_bytes)
            durable.append(self._path, line)
        except OSError as error:
            raise RunDirectoryError(f"{self._path} could not be written: {error}") from error
        self._whole_bytes += len(line)
        self._decided[session, turn] = failure

"""What clocks, servers and remote judges decided in a run, so that a replay decides the same: journal.jsonl."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mrlm_cli.errors import RunDirectoryError
from mrlm_cli.training import durable


class Journal:
    """Failures and turns by (session, turn), and what rewards gave by (session, reward); one line each, on the disk
    before `record`, `record_turns` or `record_scores` returns.

    A line torn by a kill is dropped: its decision was not yet acted upon. The journal survives a rewind. Turns and
    scores that this process writes down it does not remember: only another process, on a replay, asks for them again,
    and a long run would fill the memory with them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tracebacks = path.with_name("tracebacks.txt")
        self._whole_bytes = 0
        self._loaded = False
        self._failures: dict[tuple[str, int], str] = {}
        self._turns: dict[tuple[str, int], tuple[str, Mapping[str, Any]]] = {}  # (digest of the reply, the turn)
        self._scores: dict[tuple[str, str], dict[str, Any]] = {}

    @property
    def _decided(self) -> dict[tuple[str, int], str]:
        self._load()
        return self._failures

    def _load(self) -> None:
        """Read at first use, which is under the run's lock: before it, another process may still write."""
        if self._loaded:
            return
        self._loaded = True
        for number, line in enumerate(durable.whole_lines(self._path), start=1):
            try:
                row = json.loads(line)
                if "reward" in row:
                    outcome = "values" if "values" in row else "failure"
                    kept = {name: row[name] for name in ("session", "reward", "digest", outcome)}
                    self._scores[row["session"], row["reward"]] = kept
                elif "shown" in row:
                    self._turns[row["session"], row["turn"]] = row["digest"], row["shown"]
                else:
                    self._failures[row["session"], row["turn"]] = row["failure"]
            except (ValueError, KeyError, TypeError) as error:
                raise RunDirectoryError(f"{self._path}:{number} is not a line of a journal") from error
            self._whole_bytes += len(line) + 1

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
        self._append(durable.json_line({"session": session, "turn": turn, "failure": failure}))
        self._decided[session, turn] = failure

    def recall_turn(self, session: str, turn: int, digest: str) -> Mapping[str, Any] | None:
        """The turn that was recorded for a reply with this digest, or None."""
        self._load()
        known, shown = self._turns.get((session, turn), ("", None))
        return shown if known == digest else None

    def record_turns(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write down rows of session, turn, digest and shown. Raises RunDirectoryError."""
        self._load()
        if rows:
            self._append(b"".join(durable.json_line(row) for row in rows))

    def recall_score(self, session: str, reward: str, digest: str) -> Mapping[str, Any] | None:
        """What the reward gave this session, if its transcript was the same: a row with `values` or `failure`."""
        self._load()
        row = self._scores.get((session, reward))
        return row if row is not None and row["digest"] == digest else None

    def record_scores(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write down rows of session, reward, digest, and values or failure. Raises RunDirectoryError."""
        self._load()
        if rows:
            self._append(b"".join(durable.json_line(row) for row in rows))

    def keep_traceback(self, text: str) -> Path | None:
        """Add to the run's tracebacks.txt; None if there is no run directory yet or its disk refuses: what is told of
        an exception must not hide it."""
        try:
            with self._tracebacks.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError:
            return None
        return self._tracebacks

    def _append(self, line: bytes) -> None:
        try:
            if self._path.exists() and self._path.stat().st_size > self._whole_bytes:
                os.truncate(self._path, self._whole_bytes)
            durable.append(self._path, line)
        except OSError as error:
            raise RunDirectoryError(f"{self._path} could not be written: {error}") from error
        self._whole_bytes += len(line)

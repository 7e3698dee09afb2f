"""JSON lines: one object a line. And JSON: a file that is one list of objects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from mrlm_cli.data.base import BadRow, FileDataset, FileSettings, Row
from mrlm_cli.errors import UserError


class Jsonl(FileDataset):
    """JSON lines: one object a line; empty lines are passed over."""

    class Config(FileSettings):
        """JSON lines."""

    def read(self, path: Path) -> Iterator[Row]:
        """See FileDataset."""
        data = content(path)
        if _is_list(data):
            raise UserError(f"{path} is one JSON list, not an object a line; data.type=json reads it")
        for number, line in enumerate(data.split(b"\n"), start=1):
            if line.strip():
                yield Row(f"{path}:{number}", parsed(line))


class Json(FileDataset):
    """JSON: one list of objects."""

    class Config(FileSettings):
        """A JSON list."""

    def read(self, path: Path) -> Iterator[Row]:
        """See FileDataset."""
        data = content(path)
        try:
            found = json.loads(data) if data.strip() else []
        except (ValueError, RecursionError) as error:  # the latter where lists lie a thousand deep in one another
            raise UserError(f"{path} is not JSON: {error}") from error
        if not isinstance(found, list):
            raise UserError(f"{path} is not a list of rows; a file of one object a line has type jsonl")
        for number, item in enumerate(found):
            fields = item if isinstance(item, dict) else BadRow("a row is not an object", type(item).__name__)
            yield Row(f"{path}[{number}]", fields)


def content(path: Path) -> bytes:
    """The bytes of a file. Raises UserError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"the data {path} cannot be read: {error.strerror}") from error


def _is_list(data: bytes) -> bool:
    """Whether a file is one JSON list as a whole."""
    try:
        return data.lstrip().startswith(b"[") and isinstance(json.loads(data), list)
    except ValueError:
        return False


def parsed(line: bytes) -> dict[str, object] | BadRow:
    """One line's object, or why it is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8, and lists in lists in lists
        return BadRow("the line is not JSON", str(error))
    return found if isinstance(found, dict) else BadRow("a row is not an object", type(found).__name__)

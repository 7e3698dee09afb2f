"""Rows of a user's file: JSON lines, or parquet (extra `parquet`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mrlm_cli.errors import MissingExtra, UserError


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place for messages, row) of every row. Raises UserError for what cannot be read, MissingExtra."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                place = f"{path}:{number}"
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{place} is not a line of JSON: {error}") from error
                if not isinstance(row, dict):
                    raise UserError(f"{place} is not a JSON object")
                yield place, row
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtra(f"reading {path.name}", "parquet") from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a parquet file: {error}") from error
    for number, row in enumerate(rows):
        yield f"{path} row {number}", row

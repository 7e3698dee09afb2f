"""Parquet files, by the extra `parquet`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mrlm_cli.data.base import FileDataset, FileSettings, Row
from mrlm_cli.errors import MissingExtra, UserError


class Parquet(FileDataset):
    """Parquet: a table in columns (extra `parquet`)."""

    class Config(FileSettings):
        """A parquet file."""

        @property
        def needed_extras(self) -> tuple[str, ...]:
            """See Strict."""
            return ("parquet",)

    def read(self, path: Path) -> Iterator[Row]:
        """See FileDataset."""
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise MissingExtra("reading a parquet file", "parquet") from error
        number = 0
        try:
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches():
                    for fields in batch.to_pylist():
                        yield Row(f"{path}[{number}]", what_is_there(fields))
                        number += 1
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"the data {path} cannot be read: {str(error).partition(chr(10))[0]}") from error


def what_is_there(value: Any) -> Any:
    """A value of a table without its empty fields.

    All rows of a table have the fields of any, such as every argument that some tool call has; a row that lacks one
    must not learn to say null.
    """
    if isinstance(value, dict):
        return {name: what_is_there(each) for name, each in value.items() if each is not None}
    return [what_is_there(each) for each in value] if isinstance(value, list) else value

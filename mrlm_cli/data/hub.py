"""Datasets of the hub, by the extra `hub`; nothing of theirs is run, only their tables are read."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import model_validator

from mrlm_cli.data.base import HELD_OUT, Dataset, Row, RowSettings, check_shares
from mrlm_cli.data.parquet import what_is_there
from mrlm_cli.errors import MissingExtra, UserError
from mrlm_cli.records import Split


class Hub(Dataset):
    """A dataset of the hub, or a directory that the `datasets` package reads (extra `hub`)."""

    class Config(RowSettings):
        """A dataset of the hub."""

        path: str
        """Hub id such as `owner/name`, or a directory of tables."""
        subset: str | None = None
        """Configuration of the dataset, where it has several."""
        split: str = "train"
        """Split that is trained on."""
        validation_split: str | None = None
        """Split that is held out for evaluations of the run; by default a share of the training rows."""
        test_split: str | None = None
        """Split that is held out for `mrlm eval`; by default a share of the training rows, as with files."""

        @model_validator(mode="after")
        def _shares_or_splits(self) -> Hub.Config:
            check_shares(self, validation_split=self.validation_split, test_split=self.test_split)
            return self

        @property
        def needed_extras(self) -> tuple[str, ...]:
            """See Strict."""
            return ("hub",)

    config: Config

    @property
    def apart(self) -> tuple[Split, ...]:
        """The splits for which one of the dataset's is named."""
        return tuple(split for split in HELD_OUT if self._splits[split] is not None)

    @property
    def _splits(self) -> dict[Split, str | None]:
        config = self.config
        return {"train": config.split, "validation": config.validation_split, "test": config.test_split}

    def called(self, split: Split) -> str:
        """See Dataset."""
        return f"the dataset {self.config.path} (split {self._splits[split]})"

    def rows(self, split: Split) -> Iterator[Row]:
        """See Dataset."""
        try:
            import datasets
        except ImportError as error:
            raise MissingExtra("reading a dataset of the hub", "hub") from error
        config = self.config
        name = self._splits[split]
        try:
            table = datasets.load_dataset(config.path, config.subset, split=name)
        except Exception as error:  # a border: network, file system, unknown names and formats each raise their own
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise UserError(f"{self.called(split)} cannot be read: {reason}") from error
        for number, fields in enumerate(table):
            yield Row(f"{config.path}/{name}[{number}]", what_is_there(fields))

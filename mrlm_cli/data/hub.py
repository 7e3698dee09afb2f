"""Datasets of the hub, by the extra `hub`; nothing of theirs is run, only their tables are read."""

from __future__ import annotations

from collections.abc import Iterator

from mrlm_cli.data.base import Dataset, Row, RowSettings
from mrlm_cli.errors import MissingExtra, UserError


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
        """Split that is held out; by default a share of the training rows."""

    config: Config

    @property
    def apart(self) -> bool:
        """Whether a split is named for the held-out rows."""
        return self.config.validation_split is not None

    def rows(self, held_out: bool) -> Iterator[Row]:
        """See Dataset."""
        try:
            import datasets
        except ImportError as error:
            raise MissingExtra("reading a dataset of the hub", "hub") from error
        config = self.config
        split = config.validation_split if held_out else config.split
        try:
            table = datasets.load_dataset(config.path, config.subset, split=split)
        except Exception as error:  # a border: network, file system, unknown names and formats each raise their own
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise UserError(f"the dataset {config.path} (split {split}) cannot be read: {reason}") from error
        for number, fields in enumerate(table):
            yield Row(f"{config.path}/{split}[{number}]", fields)

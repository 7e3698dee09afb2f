"""What a dataset is: rows of a file or table, each a group of transcripts; one for a demonstration, two for a pair.

pair: (preferred, other), told apart by their reward component `preferred`, 1 and 0
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import model_validator

from mrlm_cli.errors import MrlmError
from mrlm_cli.records import Split, Transcript
from mrlm_cli.strict import DataSettings as DataSettings
from mrlm_cli.strict import Names, Strict

LABEL = "data"  # the environment's name in the tasks and episodes of a dataset
AGENT = "policy"
PREFERRED = "preferred"
HELD_OUT: tuple[Split, ...] = ("validation", "test")

Group = tuple[Transcript, ...]


class BadRow(MrlmError):
    """A row cannot be used. `reason` is one of few, so that it can be counted; `detail` is about this row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class NotWanted(BadRow):
    """A row that the settings leave out: counted, and never an error."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row. `place` is file and line; `fields` are its columns, or the reason why they could not be read."""

    place: str
    fields: Mapping[str, Any] | BadRow


class Columns(Strict):
    """Names of a dataset's columns."""

    messages: str = "messages"
    """Column of form chat: a list of messages, each with role and content."""
    prompt: str = "prompt"
    """Column of forms completion and pairs: a text or a list of messages. Pairs of whole conversations need none: their
    prompt is what they share."""
    completion: str = "completion"
    """Column of form completion: the reply, a text or a list of messages that begins with the assistant's."""
    chosen: str = "chosen"
    """Column of form pairs: the preferred reply, or the whole preferred conversation."""
    rejected: str = "rejected"
    """Column of form pairs: the other reply, or the whole other conversation."""


class RowSettings(DataSettings):
    """The settings of a dataset whose rows have columns."""

    form: Literal["chat", "completion", "pairs"] = "chat"
    """What a row is: a conversation, a prompt with its reply, or a prompt with a preferred and another reply."""
    columns: Columns = Columns()
    """Names of the columns, where they differ from the usual ones."""

    @property
    def pairs(self) -> bool:
        """Whether a row is a pair of answers, one preferred."""
        return self.form == "pairs"


def check_shares(config: DataSettings, **named: str | None) -> None:
    """Refuse a share beside what takes its place: `named` are the settings `validation_…` and `test_…`.

    Raises ValueError naming both.
    """
    for name, value in named.items():
        share = f"{name.partition('_')[0]}_share"
        if value is not None and getattr(config, share) != type(config).model_fields[share].default:
            raise ValueError(
                f"{share} has no meaning beside {name}, which names what is held out; leave one of them out"
            )


class FileSettings(RowSettings):
    """The settings of a dataset in a file."""

    path: Annotated[str, Names("file")]
    """File of the training rows, looked up beside the recipe and then in the working directory."""
    validation_path: Annotated[str | None, Names("file")] = None
    """File of held-out rows for evaluations of the run; by default a share of the training rows is held out."""
    test_path: Annotated[str | None, Names("file")] = None
    """File of held-out rows for `mrlm eval`; by default a share of the training rows, unless validation_path is set."""

    @model_validator(mode="after")
    def _shares_or_files(self) -> FileSettings:
        check_shares(self, validation_path=self.validation_path, test_path=self.test_path)
        return self


class Dataset(ABC):
    """Base of datasets: a reader of rows. `labels` are the reward components that its transcripts carry."""

    class Config(DataSettings):
        """No further settings."""

    labels: ClassVar[tuple[str, ...]] = (PREFERRED,)

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    @abstractmethod
    def apart(self) -> tuple[Split, ...]:
        """The held-out splits that are data of their own; the others are shares of the training rows."""

    def called(self, split: Split) -> str:
        """What messages call the rows of a split that `rows` gives."""
        return f"the dataset of type {self.config.type} ({split})"

    @abstractmethod
    def rows(self, split: Split) -> Iterator[Row]:
        """The rows in their order, of the training split or of one that is `apart`.

        Raises UserError where the file is not there or is none of its kind, MissingExtra where a package is needed.
        """

    def group(self, row: Row, index: int, split: Split) -> Group:
        """The row's transcripts, by the form and the columns of the settings. Raises BadRow."""
        from mrlm_cli.data import forms

        return forms.group(row, self.config, index, split)


class FileDataset(Dataset):
    """A dataset whose training rows, and perhaps held-out rows, lie in a file of their own."""

    class Config(FileSettings):
        """Which files."""

    config: Config

    @property
    def apart(self) -> tuple[Split, ...]:
        """The splits for which a file is named."""
        return tuple(split for split in HELD_OUT if self._files[split] is not None)

    @property
    def _files(self) -> dict[Split, str | None]:
        config = self.config
        return {"train": config.path, "validation": config.validation_path, "test": config.test_path}

    def called(self, split: Split) -> str:
        """See Dataset."""
        return f"the data {self._files[split]}"

    def rows(self, split: Split) -> Iterator[Row]:
        """See Dataset."""
        path = self._files[split]
        assert path is not None
        yield from self.read(Path(path).expanduser())

    @abstractmethod
    def read(self, path: Path) -> Iterator[Row]:
        """The rows of one file. Raises UserError, MissingExtra."""

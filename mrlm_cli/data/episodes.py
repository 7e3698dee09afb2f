"""Stored episodes of a run as demonstrations: behavioural cloning of what earned a reward.

What is cloned are the words: the transcript is written again with the tokens of the model that learns, which may be
another one. A reply that a limit cut has no end that could be learnt, so its episode is left out, and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from mrlm_cli.data import forms
from mrlm_cli.data.base import BadRow, Dataset, DataSettings, Group, NotWanted, Row
from mrlm_cli.data.jsonl import content, parsed
from mrlm_cli.errors import UserError
from mrlm_cli.records import Split
from mrlm_cli.strict import Names


class Episodes(Dataset):
    """Episodes that a run stored (episodes/*.jsonl), those with enough reward."""

    class Config(DataSettings):
        """Stored episodes."""

        path: Annotated[str, Names("episodes")]
        """A run directory, or one file of stored episodes."""
        min_reward: Annotated[float, Field(ge=-1e9, le=1e9)] | None = None
        """Only episodes with at least this reward; null takes all that did not fail."""
        component: str | None = None
        """Reward component that min_reward speaks of, unweighted, such as exact; by default the training reward."""

        @model_validator(mode="after")
        def _fits(self) -> Episodes.Config:
            if self.component is not None and self.min_reward is None:
                raise ValueError("component says what min_reward speaks of, and there is none")
            return self

    labels: ClassVar[tuple[str, ...]] = ()
    config: Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._components: set[str] = set()  # of the episodes so far

    @property
    def apart(self) -> tuple[Split, ...]:
        """None: shares are held out."""
        return ()

    def called(self, split: Split) -> str:
        """See Dataset."""
        return f"the data {self.config.path}"

    def rows(self, split: Split) -> Iterator[Row]:
        """See Dataset."""
        path = Path(self.config.path).expanduser()
        files = sorted((path / "episodes").glob("step-*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise UserError(f"{path} holds no stored episodes; expected a run directory with episodes/step-*.jsonl")
        for file in files:
            for number, line in enumerate(content(file).split(b"\n"), start=1):
                if line.strip():
                    yield Row(f"{file}:{number}", parsed(line))
        component, there = self.config.component, sorted(self._components)
        if component is not None and there and component not in there:
            raise UserError(f"{path}: no episode has a reward component {component}; there are: {', '.join(there)}")

    def group(self, row: Row, index: int, split: Split) -> Group:
        """See Dataset."""
        if isinstance(row.fields, BadRow):
            raise row.fields
        fields = row.fields
        try:
            view = fields["transcript"]["views"][fields["agent"]]
            if fields["stop"] == "failed":
                raise NotWanted("the episode failed")
            if not fields["ended"]:
                raise NotWanted("the last reply was cut")
            if self.config.min_reward is not None and self._reward(fields) < self.config.min_reward:
                raise NotWanted("too little reward")
        except (KeyError, TypeError, ValueError) as error:
            raise BadRow("the row is no stored episode", f"{type(error).__name__}: {error}") from error
        messages = [forms.message(item, "transcript") for item in view]
        return (forms.transcript(row.place, messages, forms.before(messages), index, split),)

    def _reward(self, fields: Mapping[str, Any]) -> float:
        component = self.config.component
        if component is None:
            return float(sum(fields["rewards"]))
        given = [(name, value) for who, _, name, value in fields["transcript"]["rewards"] if who == fields["agent"]]
        self._components.update(name for name, _ in given)
        return float(sum(value for name, value in given if name == component))

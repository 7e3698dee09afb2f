"""All rows of a dataset, split into training and held-out groups, bad rows told or counted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path

from mrlm_cli import registry
from mrlm_cli.data import forms
from mrlm_cli.data.base import AGENT, HELD_OUT, BadRow, Dataset, DataSettings, Group, NotWanted, Row, RowSettings
from mrlm_cli.draws import draw_key
from mrlm_cli.errors import UserError
from mrlm_cli.records import Split

_SHOWN = 5  # bad rows that a message names


@dataclass(frozen=True, slots=True)
class Loaded:
    """The groups in the order of their rows, the places of the rows left out by reason, and a hash of what is left."""

    train: tuple[Group, ...]
    validation: tuple[Group, ...]
    test: tuple[Group, ...]
    left_out: Mapping[str, tuple[str, ...]]
    sha256: str

    def steps(self, epochs: float, rows_per_step: int) -> int:
        """Steps in which the training rows are gone through so many times."""
        return max(1, ceil(epochs * len(self.train) / rows_per_step))

    def notes(self) -> Iterator[str]:
        """A sentence for each reason for which rows were left out."""
        for reason, places in self.left_out.items():
            yield f"data: {_told(reason, places)}"


def of(settings: DataSettings, folders: Sequence[Path]) -> Loaded:
    """The rows that a recipe's settings name; `folders` are where a plugin's file lies. Raises as `load`."""
    return load(registry.resolve("data", settings.type, folders)(settings))


def load(dataset: Dataset) -> Loaded:
    """Read everything. Raises UserError if a row is bad (unless bad rows are excluded) or none is left."""
    left_out: dict[str, list[str]] = {}
    train = _groups(dataset, "train", left_out)
    if not train:
        why = "; ".join(_told(reason, places) for reason, places in left_out.items())
        raise UserError(f"{dataset.called('train')} holds no usable row{f' ({why})' if why else ''}")
    held: dict[Split, list[Group]] = {}
    for split in dataset.apart:
        held[split] = _groups(dataset, split, left_out)
        if not held[split]:
            raise UserError(f"{dataset.called(split)}, held out ({split}), holds no usable row")
    for split, prompts in _held_out([_prompt(group) for group in train], _shares(dataset)).items():
        held[split] = [_moved(group, split) for group in train if _prompt(group) in prompts]
        train = [group for group in train if _prompt(group) not in prompts]
    if not train:  # all prompts are one
        what = "all rows have the same prompt" if sum(map(len, held.values())) > 1 else "there is only one row"
        raise UserError(f"{what}, so none can be held out; set data.validation_share: 0")
    validation, test = held.get("validation", []), held.get("test", [])
    digest = hashlib.sha256()
    for group in (*train, *validation, *test):
        digest.update(json.dumps([_canonical(group)]).encode())
    places = {reason: tuple(found) for reason, found in left_out.items()}
    return Loaded(tuple(train), tuple(validation), tuple(test), places, digest.hexdigest())


def _groups(dataset: Dataset, split: Split, left_out: dict[str, list[str]]) -> list[Group]:
    groups: list[Group] = []
    bad: list[tuple[Row, BadRow]] = []
    for row in dataset.rows(split):
        try:
            groups.append(dataset.group(row, len(groups), split))
        except NotWanted as error:
            left_out.setdefault(error.reason, []).append(row.place)
        except BadRow as error:
            bad.append((row, error))
    if dataset.config.bad_rows == "error" and bad:
        lines = [f"{row.place}: {error}" for row, error in bad[:_SHOWN]]
        more = [f"and {len(bad) - _SHOWN} more bad rows"] if len(bad) > _SHOWN else []
        each = "it" if len(bad) == 1 else "them"
        missing = all(error.reason.startswith("column ") and "missing" in error.reason for _, error in bad)
        named = _named([row for row, _ in bad], dataset.config) if missing else ""
        hint = f"mend {each}, {named}or leave {each} out with data.bad_rows=exclude"
        raise UserError("\n".join([*lines, *more, hint]))
    for row, why in bad:
        left_out.setdefault(why.reason, []).append(row.place)
    return groups


def _named(rows: Sequence[Row], config: DataSettings) -> str:
    """What to do besides about columns that are missing in all of these rows."""
    if isinstance(config, RowSettings):
        read = [row.fields for row in rows if not isinstance(row.fields, BadRow)]
        form = _common({forms.likely(fields, config.columns) for fields in read})
        column = _common({forms.conversation(fields) for fields in read})
        if form is not None:
            return f"set data.form={form}, whose columns they have, "
        if config.form == "chat" and column is not None:
            return f"set data.columns.messages={column}, "
    return "say in data.columns how they are called, "


def _common(found: set[str | None]) -> str | None:
    return found.pop() if len(found) == 1 else None


def _shares(dataset: Dataset) -> dict[Split, float]:
    """The held-out splits that come out of the training rows, and how much of them."""
    config = dataset.config
    if config.test_share is not None:
        test = config.test_share
    else:  # whoever brings held-out rows decides what is trained on
        test = 0.0 if "validation" in dataset.apart else config.validation_share
    shares: dict[Split, float] = {"validation": config.validation_share, "test": test}
    return {split: shares[split] for split in HELD_OUT if split not in dataset.apart}


def _held_out(prompts: list[str], shares: Mapping[Split, float]) -> dict[Split, set[str]]:
    """The prompts of each split: for validation those of the smallest hashes, for test those of the largest.

    Where no hash lies within the share the one nearest to it is taken; for test only if a prompt is left besides. The
    hash is of the prompt alone, whatever the run's seed: equal prompts lie on one side, and the runs of a chain
    (supervised, reward model, policy) hold out the same.
    """
    keys = {prompt: int.from_bytes(draw_key("held out", prompt), "little") for prompt in prompts}
    found: dict[Split, set[str]] = {}
    for split, share in shares.items():
        left = {prompt: key for prompt, key in keys.items() if not any(prompt in each for each in found.values())}
        found[split] = set()
        if share > 0 and split == "validation":
            found[split] = {prompt for prompt, key in left.items() if key < share * 2**128} or {
                min(left, key=lambda each: left[each])
            }
        elif share > 0 and len(left) > 1:
            found[split] = {prompt for prompt, key in left.items() if key >= (1 - share) * 2**128}
            found[split] = found[split] or {max(left, key=lambda each: left[each])}
    return found


def _moved(group: Group, split: Split) -> Group:
    return tuple(replace(each, task=replace(each.task, split=split)) for each in group)


def _prompt(group: Group) -> str:
    """The canonical text of what all transcripts of a group begin with; of the whole row if that is nothing."""
    given = int(group[0].task.data["given"])
    return json.dumps([asdict(message) for message in group[0].views[AGENT][:given]]) if given else _canonical(group)


def _canonical(group: Group) -> str:
    return json.dumps([[asdict(message) for message in each.views[AGENT]] for each in group])


def _told(reason: str, places: Sequence[str]) -> str:
    more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
    rows = "row" if len(places) == 1 else "rows"
    return f"{len(places)} {rows} left out, {reason}: {', '.join(places[:_SHOWN])}{more}"

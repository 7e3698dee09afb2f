"""All rows of a dataset, split into training and held-out groups, bad rows told or counted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path

from mrlm_cli import registry
from mrlm_cli.data.base import AGENT, BadRow, Dataset, DataSettings, Group, NotWanted, Row
from mrlm_cli.draws import draw_key
from mrlm_cli.errors import UserError

_SHOWN = 5  # bad rows that a message names


@dataclass(frozen=True, slots=True)
class Loaded:
    """The groups in the order of their rows, the places of the rows left out by reason, and a hash of what is left."""

    train: tuple[Group, ...]
    validation: tuple[Group, ...]
    left_out: Mapping[str, tuple[str, ...]]
    sha256: str

    def steps(self, epochs: float, rows_per_step: int) -> int:
        """Steps in which the training rows are gone through so many times."""
        return max(1, ceil(epochs * len(self.train) / rows_per_step))

    def notes(self) -> Iterator[str]:
        """A sentence for each reason for which rows were left out."""
        for reason, places in self.left_out.items():
            yield f"data: {len(places)} rows left out, {reason}: {_some(places)}"


def of(settings: DataSettings, folders: Sequence[Path]) -> Loaded:
    """The rows that a recipe's settings name; `folders` are where a plugin's file lies. Raises as `load`."""
    return load(registry.resolve("data", settings.type, folders)(settings))


def load(dataset: Dataset) -> Loaded:
    """Read everything. Raises UserError if a row is bad (unless bad rows are excluded) or none is left."""
    config = dataset.config
    left_out: dict[str, list[str]] = {}
    train = _groups(dataset, False, left_out)
    if not train:
        why = "; ".join(f"{reason}: {_some(places)}" for reason, places in left_out.items())
        raise UserError(f"the dataset of type {config.type} holds no usable row{f' ({why})' if why else ''}")
    if dataset.apart:
        validation = _groups(dataset, True, left_out)
        if not validation:
            raise UserError("the held-out data holds no usable row")
    else:
        held_out = _held_out([_prompt(group) for group in train], config.validation_share)
        validation = [_as_held_out(group) for group in train if _prompt(group) in held_out]
        train = [group for group in train if _prompt(group) not in held_out]
        if not train:
            raise UserError("all rows have the same prompt, so none can be held out; set data.validation_share: 0")
    digest = hashlib.sha256()
    for group in (*train, *validation):
        digest.update(json.dumps([_canonical(group)]).encode())
    places = {reason: tuple(found) for reason, found in left_out.items()}
    return Loaded(tuple(train), tuple(validation), places, digest.hexdigest())


def _groups(dataset: Dataset, held_out: bool, left_out: dict[str, list[str]]) -> list[Group]:
    groups: list[Group] = []
    bad: list[tuple[Row, BadRow]] = []
    for row in dataset.rows(held_out):
        try:
            groups.append(dataset.group(row, len(groups), held_out))
        except NotWanted as error:
            left_out.setdefault(error.reason, []).append(row.place)
        except BadRow as error:
            bad.append((row, error))
    if dataset.config.bad_rows == "error" and bad:
        lines = [f"{row.place}: {error}" for row, error in bad[:_SHOWN]]
        more = [f"and {len(bad) - _SHOWN} more bad rows"] if len(bad) > _SHOWN else []
        hint = "mend them, or leave them out with data.bad_rows=exclude"
        raise UserError("\n".join([*lines, *more, hint]))
    for row, why in bad:
        left_out.setdefault(why.reason, []).append(row.place)
    return groups


def _held_out(prompts: list[str], share: float) -> set[str]:
    """The prompts whose hash lies below the share; the one of the smallest hash if none does.

    The hash is of the prompt alone, whatever the run's seed: equal prompts lie on one side, and the runs of a chain
    (supervised, reward model, policy) hold out the same.
    """
    if share == 0:
        return set()
    keys = {prompt: draw_key("held out", prompt) for prompt in prompts}
    below = {prompt for prompt, key in keys.items() if int.from_bytes(key, "little") < share * 2**128}
    return below or {min(keys, key=lambda prompt: keys[prompt])}


def _as_held_out(group: Group) -> Group:
    return tuple(replace(each, task=replace(each.task, split="validation")) for each in group)


def _prompt(group: Group) -> str:
    """The canonical text of what all transcripts of a group begin with; of the whole row if that is nothing."""
    given = int(group[0].task.data["given"])
    return json.dumps([asdict(message) for message in group[0].views[AGENT][:given]]) if given else _canonical(group)


def _canonical(group: Group) -> str:
    return json.dumps([[asdict(message) for message in each.views[AGENT]] for each in group])


def _some(places: list[str] | tuple[str, ...]) -> str:
    return ", ".join(places[:_SHOWN]) + (f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else "")

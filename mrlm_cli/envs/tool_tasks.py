"""Generated tasks that need a tool: what is asked for is hidden behind it, or far too long to work out in a reply."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from mrlm_cli.draws import draw_key
from mrlm_cli.envs.math_problems import Dice
from mrlm_cli.records import Split

Kind = Literal["calculate", "program", "lookup", "notes", "files"]
_WORDS = (
    "amber", "basalt", "cedar", "delta", "ember", "flint", "garnet", "hazel", "indigo", "jasper", "karst", "lotus",
    "maple", "nickel", "onyx", "pearl", "quartz", "reed", "slate", "topaz", "umber", "violet", "willow", "zinc",
)  # fmt: skip
_PARTS = ("kar", "vel", "lo", "mir", "sen", "tor", "bra", "dun", "fel", "gos", "hul", "pra", "nim", "ost", "rud", "zan")


@dataclass(frozen=True, slots=True)
class ToolTask:
    """A question with its answer, what the tools hold, and the call that leads to the answer, where it is known."""

    question: str
    answer: str
    call: tuple[str, dict[str, Any]] | None = None  # name and arguments
    notes: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    documents: tuple[str, ...] = ()
    offered: tuple[str, ...] | None = None  # names of the tools to offer; None for all


def generated(split: Split, index: int, kinds: tuple[Kind, ...]) -> ToolTask:
    """Task number `index` of a split; a hash of question and answer decides which split a task belongs to."""
    for attempt in itertools.count():
        dice = Dice("tools", split, index, attempt, *kinds)
        task = _MAKERS[kinds[dice.between(0, len(kinds) - 1)]](dice)
        tenth = draw_key("tools split", task.question, task.answer)[0] * 10 // 256
        if task.answer not in task.question and split == {0: "validation", 1: "test"}.get(tenth, "train"):
            return task
    raise AssertionError("unreachable")


def _calculate(dice: Dice) -> ToolTask:
    a, b, c, d = (dice.between(10_000, 99_999) for _ in range(4))
    expression = f"{a} * {b} - {c} * {d}"
    return ToolTask(f"What is {expression}?", str(a * b - c * d), ("calculator", {"expression": expression}))


def _program(dice: Dice) -> ToolTask:
    start, factor, shift = dice.between(2, 99_999), dice.between(100, 999), dice.between(100, 999)
    times, modulus = dice.between(50, 400), dice.between(50_000, 99_999)
    value = start
    for _ in range(times):
        value = (value * factor + shift) % modulus
    question = (
        f"Start with {start}. Multiply by {factor}, add {shift}, and take the remainder after division by {modulus}; "
        f"do that {times} times in all. What is the last number?"
    )
    program = f"x = {start}\nfor _ in range({times}):\n    x = (x * {factor} + {shift}) % {modulus}\nprint(x)"
    return ToolTask(question, str(value), ("python", {"program": program}))


def _lookup(dice: Dice) -> ToolTask:
    towns: list[str] = []
    while len(towns) < 20:
        name = "".join(dice.pick(_PARTS) for _ in range(3)).capitalize()
        if name not in towns:
            towns.append(name)
    people = [dice.between(1000, 99_999) for _ in towns]
    documents = tuple(
        f"{town} lies by the river {dice.pick(_WORDS)} and has {count} inhabitants."
        for town, count in zip(towns, people, strict=True)
    )
    place = dice.between(0, len(towns) - 1)
    question = f"How many inhabitants has the town {towns[place]}?"
    return ToolTask(question, str(people[place]), ("search", {"query": towns[place]}), documents=documents)


def _notes(dice: Dice) -> ToolTask:
    notes = {word: str(dice.between(10_000, 99_999)) for word in (dice.pick(_WORDS) for _ in range(6))}
    key = list(notes)[dice.between(0, len(notes) - 1)]
    question = f"Which number does the notebook hold under the key {key}?"
    return ToolTask(question, notes[key], ("read_note", {"key": key}), notes=notes)


def _files(dice: Dice) -> ToolTask:
    files = {f"{word}.txt": str(dice.between(10_000, 99_999)) for word in (dice.pick(_WORDS) for _ in range(6))}
    name = list(files)[dice.between(0, len(files) - 1)]
    return ToolTask(f"Which number stands in the file {name}?", files[name], ("read_file", {"name": name}), files=files)


_MAKERS: dict[Kind, Callable[[Dice], ToolTask]] = {
    "calculate": _calculate,
    "program": _program,
    "lookup": _lookup,
    "notes": _notes,
    "files": _files,
}
NEEDED: dict[Kind, str] = {
    "calculate": "calculator",
    "program": "python",
    "lookup": "search",
    "notes": "notes",
    "files": "files",
}
"""The tool that a kind of task cannot do without."""

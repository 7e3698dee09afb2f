"""Files of tasks that users bring to the environment `tools`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mrlm_cli.draws import shuffled
from mrlm_cli.envs.rows import read_rows
from mrlm_cli.envs.splits import split_classes
from mrlm_cli.envs.tool_tasks import ToolTask
from mrlm_cli.errors import UserError
from mrlm_cli.records import Split


@cache
def read(path: str, known: tuple[str, ...] | None) -> Mapping[Split, tuple[ToolTask, ...]]:
    """The tasks of a file by split; of equal questions the first one. `known` are the names of all tools, if they are
    known before a session begins. Raises UserError that names the place."""
    found: dict[str, ToolTask] = {}
    for place, row in read_rows(Path(path).expanduser()):
        question = row.get("question")
        if not isinstance(question, str) or not question.strip():
            raise UserError(f"{place} has no text called question")
        task = ToolTask(question, _answer(place, row), offered=_offered(place, row, known))
        found.setdefault(re.sub(r"\s+", " ", question).strip().lower(), task)
    if len(found) < 3:
        raise UserError(f"{path} holds {len(found)} questions; expected at least 3, one for each split")
    questions = list(found)
    return {
        split: tuple(found[questions[i]] for i in shuffled(chosen, "tools", split))
        for split, chosen in split_classes(questions).items()
    }


def _answer(place: str, row: Mapping[str, Any]) -> str:
    answer = row.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise UserError(f"{place}: expected `answer`, a text or a number")
    return str(answer).strip()


def _offered(place: str, row: Mapping[str, Any], known: tuple[str, ...] | None) -> tuple[str, ...] | None:
    names = row.get("tools")
    if names is None:
        return None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{place}: tools must be a list of names")
    for name in names:
        if known is not None and name not in known:
            raise UserError(f"{place}: no tool is called {name!r}; there are {', '.join(known)}")
    return tuple(names)

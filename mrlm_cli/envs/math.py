r"""Mathematics: problems made by generators, or read from a file like GSM8K or MATH, answered in free text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from mrlm_cli.draws import shuffled
from mrlm_cli.envs import math_answers
from mrlm_cli.envs.base import Environment
from mrlm_cli.envs.math_problems import LEVELS, TOPICS, Dice, Problem
from mrlm_cli.envs.rows import read_rows
from mrlm_cli.envs.single import SingleReply
from mrlm_cli.envs.splits import split_classes
from mrlm_cli.errors import UserError
from mrlm_cli.records import Reply, Split, Task
from mrlm_cli.strict import EnvironmentSettings, Names

CANDIDATES = 4000  # problems drawn of each topic and level, of which equal ones are kept once
_INSTRUCTIONS = {
    "boxed": "Put the final answer in \\boxed{}.",
    "tagged": "Put the final answer between <answer> and </answer>.",
    "last_number": "End with the final answer.",
}
Topic = Literal["arithmetic", "algebra", "word_problems", "multi_step"]


class Math(Environment):
    r"""Solve a problem; the answer is taken from `\boxed{}`, from tags, or is the last number of the reply.

    Components: `correct`, 1 if the answer is right, wherever it stands (the form that is asked for is looked at first);
    `format`, 1 if the reply ended by itself and its answer stands in the form that is asked for (`last_number`: the
    reply ends with it); `exact`, 1 for both.

    Problems come from generators, or from the file in `path`: rows with `problem` or `question`, and `answer` (with
    GSM8K's `####` or without) or `solution` (with MATH's \boxed{}). Equal problems are kept once. Without files of
    their own, validation and test take a tenth of the problems each, chosen by a hash of the problem.

    `checker: exact` compares rational numbers and normalised texts; `math_verify` (extra `math`) knows more forms; it
    may not come to an end, so sessions then run in worker processes, where a reply that keeps it busy is wrong (the
    fact `hung`).
    """

    class Config(EnvironmentSettings):
        """Which problems, and how the answer is asked for and checked."""

        topics: Annotated[tuple[Topic, ...], Field(strict=False, min_length=1)] = get_args(Topic)
        """Generators, each as likely as the others; not used with a file."""
        levels: Annotated[tuple[Annotated[int, Field(ge=1, le=LEVELS)], ...], Field(strict=False, min_length=1)] = (1,)
        """Difficulties from 1 to 5, each as likely as the others; not used with a file."""
        path: Annotated[str | None, Names("file")] = None
        """A file of problems instead of generators: JSON lines, or .parquet (extra `parquet`)."""
        validation_path: Annotated[str | None, Names("file")] = None
        """A file of validation problems; by default a tenth of those in `path`."""
        test_path: Annotated[str | None, Names("file")] = None
        """A file of test problems; by default a tenth of those in `path`. Problems in it are never trained on."""
        form: math_answers.Form = "boxed"
        """Where the answer is asked for: in a box, between tags, or as the last thing said."""
        prompt: Annotated[str, Field(min_length=1, max_length=10_000)] = "{problem}\n{instruction}"
        """The question; `{problem}` stands for the problem and `{instruction}` for the sentence on the form."""
        checker: Literal["exact", "math_verify"] = "exact"
        """How answers are compared."""
        judging_seconds: Annotated[float, Field(gt=0, le=3600)] = 5.0
        """Seconds for math_verify and one reply, at most hardware.deadline; a reply that takes longer is wrong, if the
        right answer does not take as long."""

        @model_validator(mode="after")
        def _fits(self) -> Math.Config:
            if self.path is None and (self.validation_path or self.test_path):
                raise ValueError("validation_path and test_path need path, the problems to train on")
            if "{problem}" not in self.prompt:
                raise ValueError("prompt must contain {problem}")
            return self

        @property
        def needed_extras(self) -> tuple[str, ...]:
            """See Strict."""
            return ("math",) if self.checker == "math_verify" else ()

    components: ClassVar[dict[str, float]] = {"correct": 1.0, "format": 0.1, "exact": 0.0}
    audited: ClassVar[bool] = True
    single_reply: ClassVar[bool] = True
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.checker == "math_verify":
            math_answers.require_math_verify()

    @property
    def in_process(self) -> bool:
        """Not with math-verify, which may not come to an end."""
        return self.config.checker == "exact"

    @property
    def judging_seconds(self) -> float | None:
        """For math-verify."""
        return None if self.in_process else self.config.judging_seconds

    def size(self, split: Split) -> int:
        """Problems in the split."""
        return len(self._problems(split))

    def task(self, split: Split, index: int) -> Task:
        """Problem number `index` of the split. Raises ValueError outside range(size), UserError for a broken file."""
        problems = self._problems(split)
        if not 0 <= index < len(problems):
            raise ValueError(f"{split} has no task {index}")
        data = {"problem": problems[index].text, "answer": problems[index].answer}
        return Task(f"{split}/{index}", self.config.label, split, index, data)

    def open(self, task: Task, seed: int) -> SingleReply:
        """Ask; nothing depends on the seed."""
        if not self.in_process:
            math_answers.import_math_verify()  # it takes longer than to judge
        question = self.config.prompt.replace("{instruction}", _INSTRUCTIONS[self.config.form])
        question = question.replace("{problem}", task.data["problem"])
        return SingleReply(question, lambda reply: (self._rewards(task.data["answer"], reply), {}))

    def oracle(self, task: Task) -> str:
        """The answer in its form."""
        answer = str(task.data["answer"])
        return {"boxed": f"\\boxed{{{answer}}}", "tagged": f"<answer>{answer}</answer>"}.get(self.config.form, answer)

    def canonical(self, task: Task) -> str:
        """The problem without the order of terms, names, or case and blanks."""
        return self._problems(task.split)[task.index].canonical

    def _rewards(self, gold: str, reply: Reply) -> Mapping[str, float]:
        text, form = reply.message.content, self.config.form
        answer = math_answers.anywhere(text, form)
        correct = answer is not None and self._same(gold, answer)
        formed = math_answers.extract(text, form)
        well = reply.stop != "length" and formed is not None
        if form == "last_number" and formed is not None:
            well = well and text.rstrip(" \n.").endswith(formed)
        return {"correct": float(correct), "format": float(well), "exact": float(correct and well)}

    def _same(self, gold: str, answer: str) -> bool:
        if math_answers.equal(gold, answer):
            return True
        return self.config.checker == "math_verify" and math_answers.verified(gold, answer)

    def _problems(self, split: Split) -> tuple[Problem, ...]:
        config = self.config
        if config.path is None:
            return _generated(config.topics, config.levels)[split]
        return _read(config.path, config.validation_path, config.test_path, config.form == "last_number")[split]


@cache
def _generated(topics: tuple[str, ...], levels: tuple[int, ...]) -> dict[Split, tuple[Problem, ...]]:
    problems: dict[str, Problem] = {}
    for topic in dict.fromkeys(topics):
        for level in dict.fromkeys(levels):
            for number in range(CANDIDATES):
                made = TOPICS[topic](level, Dice("math", topic, level, number))
                problems.setdefault(made.canonical, made)
    return _split(problems)


def _split(problems: Mapping[str, Problem]) -> dict[Split, tuple[Problem, ...]]:
    names = list(problems)
    return {
        split: tuple(problems[names[i]] for i in shuffled(chosen, "math", split))
        for split, chosen in split_classes(names).items()
    }


@cache
def _read(path: str, validation: str | None, test: str | None, numbers: bool) -> dict[Split, tuple[Problem, ...]]:
    given: dict[Split, dict[str, Problem]] = {}
    if test is not None:
        given["test"] = _file(test, numbers)
    if validation is not None:
        tested = given.get("test", {})
        given["validation"] = {name: one for name, one in _file(validation, numbers).items() if name not in tested}
    rest = {name: one for name, one in _file(path, numbers).items() if not any(name in held for held in given.values())}
    if len(rest) < 3:
        raise UserError(f"{path} has {len(rest)} problems to train on; expected at least 3")
    if len(given) == 2:
        return {"train": tuple(rest.values()), **{split: tuple(held.values()) for split, held in given.items()}}
    drawn = _split(rest)
    if given:  # the tenth of the split that has a file is trained on
        (split,) = given
        spare = drawn[split]
        return {**drawn, "train": drawn["train"] + spare, split: tuple(given[split].values())}
    return drawn


def _file(path: str, numbers: bool) -> dict[str, Problem]:
    problems: dict[str, Problem] = {}
    for place, row in read_rows(Path(path).expanduser()):
        text = row.get("problem", row.get("question"))
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{place}: expected a text `problem` or `question`")
        gold = _gold(place, row)
        if numbers and math_answers.rational(gold) is None:
            raise UserError(f"{place}: the answer {gold[:60]!r} is no number; ask for it in the form boxed or tagged")
        canonical = re.sub(r"\s+", " ", text).strip().lower()
        problems.setdefault(canonical, Problem(text, gold, canonical))
    if not problems:
        raise UserError(f"{path} holds no problem")
    return problems


def _gold(place: str, row: Mapping[str, Any]) -> str:
    """The right answer of a row: after `####`, in the last box, or the whole of `answer`."""
    for text in _texts(row):
        if "####" in text:
            return text.rpartition("####")[2].strip()
        boxed = math_answers.extract(text, "boxed")
        if boxed is not None:
            return boxed
    answer = row.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise UserError(f"{place}: expected `answer`, or `solution` with the answer in \\boxed{{}}")
    return str(answer).strip()


def _texts(row: Mapping[str, Any]) -> Iterator[str]:
    for name in ("answer", "solution"):
        if isinstance(row.get(name), str):
            yield row[name]

"""Arithmetic: `What is 27 + 15? Answer with just the number.` is answered by `42`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from mrlm_cli.draws import permuted
from mrlm_cli.envs.base import Environment
from mrlm_cli.envs.single import SingleReply
from mrlm_cli.envs.splits import split_classes
from mrlm_cli.records import Reply, Split, Task
from mrlm_cli.strict import EnvironmentSettings

MOST_TASKS = 32_768  # distinct expressions that are split into train, validation and test
_SPOKEN = {"+": "plus", "-": "minus", "*": "times"}
# fmt: off
_ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
         "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
# fmt: on
_NUMBER = re.compile(r"-?[0-9]+")  # ASCII alone: \d and int() would take the digits of every script
_LONGEST = 100  # characters of a number that is compared digit by digit


class Arithmetic(Environment):
    """Evaluate a chain of whole numbers; `*` binds before `+` and `-`.

    Components: `exact`, 1 if the reply, without surrounding blanks, is the number and ended by itself; `shaped`, the
    training reward: 1 for an exact reply; for an ended reply that is a bare but wrong number 0.3, plus 0.1 times the
    share of digits that are right (aligned at the units); otherwise 0.1 for ending and 0.15 if the last number in the
    reply is right.

    Expressions are drawn without repetition from all that the settings allow (at most 32,768 of them). Expressions
    that differ in the order of terms or factors alone, such as 27 + 15 and 15 + 27, belong to one split.
    """

    class Config(EnvironmentSettings):
        """What is asked."""

        operators: Annotated[tuple[Literal["+", "-", "*"], ...], Field(strict=False, min_length=1)] = ("+",)
        """Operators, each as likely as the others."""
        low: Annotated[int, Field(ge=0, le=999_999)] | None = None
        """Smallest operand; by default 1, or what `digits` says."""
        high: Annotated[int, Field(ge=0, le=999_999)] | None = None
        """Largest operand; by default 50, which leaves a 135M model much to learn, or what `digits` says."""
        digits: Annotated[int, Field(ge=1, le=6)] | None = None
        """Operands have exactly so many digits; instead of low and high."""
        operands: Annotated[int, Field(ge=2, le=8)] = 2
        """Numbers in the chain."""
        form: Literal["symbols", "words"] = "symbols"
        """`27 + 15`, or `twenty-seven plus fifteen`; the answer is in digits either way."""
        prompt: Annotated[str, Field(min_length=1, max_length=10_000)] = (
            "What is {expression}? Answer with just the number."
        )
        """The question; `{expression}` stands for the expression."""

        @model_validator(mode="after")
        def _fits(self) -> Arithmetic.Config:
            if self.digits is not None and (self.low is not None or self.high is not None):
                raise ValueError("digits takes the place of low and high; give one or the other")
            low, high = self.range
            if low > high:
                raise ValueError(f"low ({low}) is above high ({high})")
            if len(set(self.operators)) != len(self.operators):
                raise ValueError("operators names one of them twice")
            if "{expression}" not in self.prompt:
                raise ValueError("prompt must contain {expression}")
            if high - low < 9:
                raise ValueError("fewer than ten operands leave nothing to hold out; widen low and high")
            return self

        @property
        def range(self) -> tuple[int, int]:
            """Smallest and largest operand."""
            if self.digits is None:
                return 1 if self.low is None else self.low, 50 if self.high is None else self.high
            return (10 ** (self.digits - 1) if self.digits > 1 else 0), 10**self.digits - 1

    components: ClassVar[dict[str, float]] = {"shaped": 1.0, "exact": 0.0}
    audited: ClassVar[bool] = True
    single_reply: ClassVar[bool] = True
    config: Config

    def size(self, split: Split) -> int:
        """Expressions in the split."""
        return len(self._ranks(split))

    def task(self, split: Split, index: int) -> Task:
        """Expression number `index` of the split. Raises ValueError outside range(size)."""
        ranks = self._ranks(split)
        if not 0 <= index < len(ranks):
            raise ValueError(f"{split} has no task {index}")
        numbers, operators = _expression(ranks[index], *self._space)
        data = {"numbers": numbers, "operators": operators, "answer": str(_value(numbers, operators))}
        return Task(f"{split}/{index}", self.config.label, split, index, data)

    def open(self, task: Task, seed: int) -> SingleReply:
        """Ask the question; nothing depends on the seed."""
        words = self.config.form == "words"
        parts = [_say(task.data["numbers"][0]) if words else str(task.data["numbers"][0])]
        for operator, number in zip(task.data["operators"], task.data["numbers"][1:], strict=True):
            parts += [_SPOKEN[operator], _say(number)] if words else [operator, str(number)]
        question = self.config.prompt.replace("{expression}", " ".join(parts))
        return SingleReply(question, lambda reply: (_rewards(task.data["answer"], reply), {}))

    def oracle(self, task: Task) -> str:
        """The right reply."""
        return str(task.data["answer"])

    def canonical(self, task: Task) -> str:
        """The expression without the order of its terms and factors."""
        return _canonical(task.data["numbers"], task.data["operators"])

    @property
    def _space(self) -> tuple[tuple[str, ...], int, int, int]:
        return self.config.operators, *self.config.range, self.config.operands

    def _ranks(self, split: Split) -> list[int]:
        return _split(*self._space)[split]


def _rewards(answer: str, reply: Reply) -> Mapping[str, float]:
    text = reply.message.content.strip()
    ended = reply.stop != "length"
    if ended and text == answer:
        return {"shaped": 1.0, "exact": 1.0}
    if ended and len(text) <= _LONGEST and _NUMBER.fullmatch(text):
        return {"shaped": 0.3 + 0.1 * _closeness(text, answer), "exact": 0.0}
    found = _NUMBER.findall(text)
    return {"shaped": 0.1 * ended + 0.15 * bool(found and found[-1] == answer), "exact": 0.0}


def _closeness(text: str, answer: str) -> float:
    """Share of characters that are equal, aligned on the right, over the longer text."""
    return sum(a == b for a, b in zip(text[::-1], answer[::-1], strict=False)) / max(len(text), len(answer))


@cache
def _split(operators: tuple[str, ...], low: int, high: int, operands: int) -> dict[Split, list[int]]:
    """Ranks of the expressions of each split, in a fixed mixed order; all of an equivalence class in one split."""
    size = _size(operators, low, high, operands)
    by_class: dict[str, list[int]] = {}
    order: dict[int, int] = {}
    for place in range(min(size, MOST_TASKS)):
        rank = permuted(place, size, "arithmetic", *operators, low, high, operands)
        order[rank] = place
        by_class.setdefault(_canonical(*_expression(rank, operators, low, high, operands)), []).append(rank)
    classes = sorted(by_class)
    return {
        split: sorted((rank for i in chosen for rank in by_class[classes[i]]), key=order.__getitem__)
        for split, chosen in split_classes(classes).items()
    }


def _size(operators: tuple[str, ...], low: int, high: int, operands: int) -> int:
    """How many expressions there are."""
    return (high - low + 1) ** operands * len(operators) ** (operands - 1)


def _expression(
    rank: int, operators: tuple[str, ...], low: int, high: int, operands: int
) -> tuple[list[int], list[str]]:
    """Expression number `rank`, its digits read as a number with mixed bases."""
    numbers, chosen = [], []
    for _ in range(operands):
        rank, digit = divmod(rank, high - low + 1)
        numbers.append(low + digit)
    for _ in range(operands - 1):
        rank, digit = divmod(rank, len(operators))
        chosen.append(operators[digit])
    return numbers, chosen


def _terms(numbers: list[int], operators: list[str]) -> list[tuple[int, list[int]]]:
    """The expression as a sum: (sign, factors) of every term."""
    terms = [(1, [numbers[0]])]
    for operator, number in zip(operators, numbers[1:], strict=True):
        if operator == "*":
            terms[-1][1].append(number)
        else:
            terms.append((1 if operator == "+" else -1, [number]))
    return terms


def _value(numbers: list[int], operators: list[str]) -> int:
    total = 0
    for sign, factors in _terms(numbers, operators):
        product = sign
        for factor in factors:
            product *= factor
        total += product
    return total


def _canonical(numbers: list[int], operators: list[str]) -> str:
    return " ".join(
        sorted(f"{'+-'[sign < 0]}{'*'.join(map(str, sorted(f)))}" for sign, f in _terms(numbers, operators))
    )


def _say(number: int) -> str:
    """A number below a million in English words."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        return _TENS[number // 10] + (f"-{_ONES[number % 10]}" if number % 10 else "")
    for unit, name in ((1000, "thousand"), (100, "hundred")):
        if number >= unit:
            rest = number % unit
            return f"{_say(number // unit)} {name}" + (f" {_say(rest)}" if rest else "")
    raise ValueError(f"{number} has no words here")

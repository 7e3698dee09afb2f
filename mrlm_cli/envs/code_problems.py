"""Programming problems: the record, and generated ones, pipelines of small steps on a number, a list or a text."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from mrlm_cli.draws import draw_key
from mrlm_cli.envs.math_problems import Dice
from mrlm_cli.records import Split

LEVELS = 5
ENTRY = "solve"
HIDDEN = 8  # tests that decide
COMMONEST = 3  # hidden tests that may have the same answer, which a constant would give
SHOWN = 2  # examples in the text, none of them among the hidden tests
Form = Literal["function", "script"]
Input = Literal["number", "list", "text"]


@dataclass(frozen=True, slots=True)
class Case:
    """For a function its arguments and value; for a script the texts that it reads and prints."""

    given: Any  # a tuple of arguments, or a text
    expected: Any


@dataclass(frozen=True, slots=True)
class CodeProblem:
    """What is asked, and the tests that decide.

    `before` is put in front of every program (HumanEval's header). With `check`, a program whose last function is
    check(candidate), the hidden tests are the calls that it makes; they are found by `code_files.recorded`.
    """

    text: str
    form: Form
    hidden: tuple[Case, ...]
    canonical: str  # equal for problems that are the same
    entry: str = ENTRY
    shown: tuple[Case, ...] = ()
    solution: str | None = None
    before: str = ""
    check: str = ""


@dataclass(frozen=True, slots=True)
class _Step:
    takes: str  # number, list or text
    gives: str
    words: str
    code: str  # an expression of x
    act: Callable[[Any, int, str], Any]
    low: int = 0  # range of k
    high: int = 0

    @property
    def variants(self) -> int:
        """Problems that differ in k or c alone."""
        return len(_LETTERS) if "{c" in self.code else self.high - self.low + 1


_LETTERS = "abcdeilnorst"
_STEPS = (
    _Step("number", "number", "add {k}", "x + {k}", lambda x, k, c: x + k, 2, 50),
    _Step("number", "number", "subtract {k}", "x - {k}", lambda x, k, c: x - k, 2, 50),
    _Step("number", "number", "multiply by {k}", "x * {k}", lambda x, k, c: x * k, 2, 20),
    _Step("number", "number", "take the remainder after division by {k}", "x % {k}", lambda x, k, c: x % k, 3, 30),
    _Step("number", "number", "take the larger of it and {k}", "max(x, {k})", lambda x, k, c: max(x, k), -20, 40),
    _Step("number", "number", "take the smaller of it and {k}", "min(x, {k})", lambda x, k, c: min(x, k), -20, 40),
    _Step("number", "number", "subtract it from {k}", "{k} - x", lambda x, k, c: k - x, 1, 99),
    _Step("number", "number", "square it", "x * x", lambda x, k, c: x * x),
    _Step("list", "list", "keep the numbers above {k}", "[v for v in x if v > {k}]",
          lambda x, k, c: [v for v in x if v > k], -10, 20),
    _Step("list", "list", "keep the numbers below {k}", "[v for v in x if v < {k}]",
          lambda x, k, c: [v for v in x if v < k], 0, 30),
    _Step("list", "list", "keep the multiples of {k}", "[v for v in x if v % {k} == 0]",
          lambda x, k, c: [v for v in x if v % k == 0], 2, 6),
    _Step("list", "list", "drop the multiples of {k}", "[v for v in x if v % {k}]",
          lambda x, k, c: [v for v in x if v % k], 2, 6),
    _Step("list", "list", "add {k} to each number", "[v + {k} for v in x]", lambda x, k, c: [v + k for v in x], 2, 30),
    _Step("list", "list", "multiply each number by {k}", "[v * {k} for v in x]",
          lambda x, k, c: [v * k for v in x], 2, 12),
    _Step("list", "list", "sort in ascending order", "sorted(x)", lambda x, k, c: sorted(x)),
    _Step("list", "list", "sort in descending order", "sorted(x, reverse=True)",
          lambda x, k, c: sorted(x, reverse=True)),
    _Step("list", "list", "reverse the order", "x[::-1]", lambda x, k, c: x[::-1]),
    _Step("list", "list", "drop repeated numbers, keeping the first of each", "list(dict.fromkeys(x))",
          lambda x, k, c: list(dict.fromkeys(x))),
    _Step("list", "list", "keep only the first {k} numbers", "x[:{k}]", lambda x, k, c: x[:k], 2, 5),
    _Step("list", "list", "drop the first {k} numbers", "x[{k}:]", lambda x, k, c: x[k:], 1, 4),
    _Step("list", "number", "take the sum", "sum(x)", lambda x, k, c: sum(x)),
    _Step("list", "number", "count the numbers", "len(x)", lambda x, k, c: len(x)),
    _Step("list", "number", "take the largest number, or {k} if there is none", "max(x, default={k})",
          lambda x, k, c: max(x, default=k), -9, 9),
    _Step("list", "number", "take the smallest number, or {k} if there is none", "min(x, default={k})",
          lambda x, k, c: min(x, default=k), -9, 9),
    _Step("text", "text", "reverse the characters", "x[::-1]", lambda x, k, c: x[::-1]),
    _Step("text", "text", "turn it into upper case", "x.upper()", lambda x, k, c: x.upper()),
    _Step("text", "text", "remove every letter {c}", "x.replace({c!r}, '')", lambda x, k, c: x.replace(c, "")),
    _Step("text", "text", "double every letter {c}", "x.replace({c!r}, {c!r} * 2)",
          lambda x, k, c: x.replace(c, c * 2)),
    _Step("text", "text", "keep only the first {k} characters", "x[:{k}]", lambda x, k, c: x[:k], 3, 12),
    _Step("text", "number", "count how often the letter {c} occurs", "x.count({c!r})", lambda x, k, c: x.count(c)),
    _Step("text", "number", "count the characters", "len(x)", lambda x, k, c: len(x)),
    _Step("text", "list", "list the lengths of the words", "[len(w) for w in x.split()]",
          lambda x, k, c: [len(w) for w in x.split()]),
)  # fmt: skip
_KINDS = {"number": "a whole number", "list": "a list of whole numbers", "text": "a text of lower-case words"}
BEGINNINGS: dict[int, tuple[Input, ...]] = {  # what the problems of a level may take
    1: ("number", "list", "text"),
    2: ("number", "list"),
    3: ("list", "text"),
    4: ("list", "text"),
    5: ("list", "text"),
}
_WORDS = (
    "tree", "stone", "river", "cloud", "lantern", "idle", "order", "notes", "tin",
    "banana", "oracle", "steel", "corn", "lease", "radio", "tile", "insert", "cell",
)  # fmt: skip


def generated(
    split: Split, index: int, levels: tuple[int, ...], forms: tuple[Form, ...], inputs: tuple[Input, ...]
) -> CodeProblem:
    """Problem number `index` of a split; there is no end to them, but single steps (level 1) soon repeat each other.

    Which split a problem belongs to is a hash of what it does to many inputs, so problems that are the same under
    other words never lie in two splits. Candidates are drawn until one belongs to `split` and does enough. Held-out
    splits hold a tenth of the problems each, and draw one of steps with few variants (`square it` has no other) less
    often: else the only one of its kind in a split would be most of it.

    Each of `levels` must allow one of `inputs` (see BEGINNINGS).
    """
    for attempt in itertools.count():
        dice = Dice("code", split, index, attempt, *levels, *forms)
        level = levels[dice.between(0, len(levels) - 1)]
        form = forms[dice.between(0, len(forms) - 1)]
        beginnings = [kind for kind in BEGINNINGS[level] if kind in inputs]
        found = _pipeline(level, form, dice.pick(beginnings), dice, thinned=split != "train")
        if found is not None and _split_of(found.canonical) == split:
            return found
    raise AssertionError("unreachable")


def _pipeline(level: int, form: Form, beginning: str, dice: Dice, *, thinned: bool) -> CodeProblem | None:
    """A pipeline of `level` steps; None if its answers hardly depend on the input.

    `thinned`: None as well for some of those whose steps have less than ten variants.
    """
    kind = beginning
    chosen: list[tuple[_Step, int, str]] = []
    for _ in range(level):
        fitting = [step for step in _STEPS if step.takes == kind]
        step = fitting[dice.between(0, len(fitting) - 1)]
        chosen.append((step, dice.between(step.low, step.high), dice.pick(_LETTERS)))
        kind = step.gives
    if thinned and dice.between(1, 10) > math.prod(step.variants for step, _, _ in chosen):
        return None

    def answer(x: Any) -> Any:
        for step, k, c in chosen:
            x = step.act(x, k, c)
        return x

    fixed = Dice("code battery", beginning)
    battery = [_input(beginning, fixed) for _ in range(40)]
    inputs: list[Any] = []
    while len(inputs) < HIDDEN + SHOWN:
        drawn = _input(beginning, dice)
        if drawn not in inputs:
            inputs.append(drawn)
    tests = [Case((x,), answer(x)) for x in inputs]
    identity = all(answer(x) == x for x in battery)
    if identity or max(Counter(repr(test.expected) for test in tests[SHOWN:]).values()) > COMMONEST:
        return None
    done = hashlib.blake2b(repr([beginning, [answer(x) for x in battery]]).encode(), digest_size=16).hexdigest()
    lines = [f"    x = {step.code.format(k=k, c=c)}" for step, k, c in chosen]
    if form == "script":
        tests = [Case(_written(test.given[0]) + "\n", _written(test.expected) + "\n") for test in tests]
    return CodeProblem(
        text=_text(beginning, kind, form, [step.words.format(k=k, c=c) for step, k, c in chosen], tests[:SHOWN]),
        form=form,
        hidden=tuple(tests[SHOWN:]),
        canonical=done,
        shown=tuple(tests[:SHOWN]),
        solution="\n".join([f"def {ENTRY}(x):", *lines, "    return x", *_main(beginning, kind, form)]),
    )


def _input(kind: str, dice: Dice) -> Any:
    if kind == "number":
        return dice.between(-30, 60)
    if kind == "list":
        return [dice.between(-15, 30) for _ in range(dice.between(0, 9))]
    return " ".join(dice.pick(_WORDS) for _ in range(dice.between(1, 5)))


def _written(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _text(beginning: str, ending: str, form: Form, steps: list[str], examples: list[Case]) -> str:
    numbered = "; ".join(steps) if len(steps) == 1 else "; ".join(f"({n}) {step}" for n, step in enumerate(steps, 1))
    if form == "function":
        head = f"Write a Python function {ENTRY}(x), where x is {_KINDS[beginning]}. It must {numbered}"
        shown = "\n".join(f"{ENTRY}({test.given[0]!r}) == {test.expected!r}" for test in examples)
        return f"{head}{', in this order' * (len(steps) > 1)}, and return the result.\nExamples:\n{shown}"
    how = {"number": "one line with a number", "list": "one line of numbers between blanks", "text": "one line of text"}
    printed = {"number": "it", "list": "the numbers in one line, between blanks", "text": "it"}[ending]
    head = f"Write a Python program that reads {how[beginning]} from standard input. It must {numbered}"
    shown = "\n".join(f"input: {test.given.rstrip()}\noutput: {test.expected.rstrip()}" for test in examples)
    return f"{head}{', in this order' * (len(steps) > 1)}, and print {printed}.\nExamples:\n{shown}"


def _main(beginning: str, ending: str, form: Form) -> list[str]:
    if form == "function":
        return []
    read = {"number": "int(input())", "list": "list(map(int, input().split()))", "text": "input()"}[beginning]
    return [f"print(*{ENTRY}({read}))" if ending == "list" else f"print({ENTRY}({read}))"]


def _split_of(canonical: str) -> Split:
    """A tenth of all problems for validation and for test each."""
    tenth = draw_key("code split", canonical)[0] * 10 // 256
    return "validation" if tenth == 0 else "test" if tenth == 1 else "train"

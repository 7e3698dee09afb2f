"""Problems with numbers for answers, made from dice: arithmetic, algebra, word problems, chains of steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from mrlm_cli.draws import draw_key, uniforms

LEVELS = 5


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with its answer; `canonical` is equal for problems that are the same but for order or names."""

    text: str
    answer: str  # 42, -3/4
    canonical: str


class Dice:
    """Numbers that are a function of the key and of how many were thrown before."""

    def __init__(self, *key: int | str) -> None:
        self._key = draw_key(*key)
        self._thrown = 0

    def between(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        self._thrown += 1
        return low + int(uniforms(self._key, self._thrown)[0] * (high - low + 1))

    def pick(self, items: Sequence[str]) -> str:
        """One of the items."""
        return items[self.between(0, len(items) - 1)]


# arithmetic: an expression is (value, text, canonical, whether it is one number)
_Expression = tuple[Fraction, str, str, bool]
_OPERATORS = {1: "+-", 2: "+-*", 3: "+-*", 4: "+-*", 5: "+-*/"}
_OPERANDS = {1: 2, 2: 2, 3: 3, 4: 4, 5: 4}
_LARGEST = {1: 20, 2: 99, 3: 20, 4: 20, 5: 12}


def arithmetic(level: int, dice: Dice) -> Problem:
    """Expressions of 2 to 4 numbers; parentheses from level 3, division and so fractions at level 5."""
    parts = [_number(dice.between(1, _LARGEST[level])) for _ in range(_OPERANDS[level])]
    while len(parts) > 1:
        place = dice.between(0, len(parts) - 2)
        operator = dice.pick(_OPERATORS[level])
        if operator == "/" and parts[place + 1][0] == 0:
            operator = "+"
        parts[place : place + 2] = [_joined(parts[place], operator, parts[place + 1])]
    value, text, canonical, _ = parts[0]
    return Problem(f"What is {text}?", str(value), f"arithmetic {canonical}")


def _number(value: int) -> _Expression:
    return Fraction(value), str(value), str(value), True


def _joined(left: _Expression, operator: str, right: _Expression) -> _Expression:
    a, b = left[0], right[0]
    value = {"+": a + b, "-": a - b, "*": a * b}[operator] if operator != "/" else a / b
    text = " ".join([left[1] if left[3] else f"({left[1]})", operator, right[1] if right[3] else f"({right[1]})"])
    sides = sorted([left[2], right[2]]) if operator in "+*" else [left[2], right[2]]
    return value, text, f"({operator} {' '.join(sides)})", False


# algebra


def algebra(level: int, dice: Dice) -> Problem:
    """Linear equations of one unknown (levels 1 to 3), two equations of two (4), quadratic equations (5)."""
    if level == 4:
        return _two_unknowns(dice)
    if level == 5:
        roots = sorted((dice.between(-12, 12), dice.between(-12, 12)))
        if roots[0] == roots[1]:
            roots[1] += 1
        low, high = roots
        equation = f"x^2{_signed(-low - high, 'x')}{_signed(low * high, '')} = 0"
        text = f"What is the larger solution of {equation}?"
        return Problem(text, str(high), f"quadratic {low} {high}")
    x = dice.between(1, 30) if level == 1 else dice.between(-20, 20)
    a = 1 if level == 1 else dice.between(2, 12)
    c = 0
    if level == 3:
        c = dice.between(2, 12)
        a += a == c
    b = dice.between(1, 30) * (1 if dice.between(0, 1) else -1)
    d = (a - c) * x + b
    right = f"{_lead(c, 'x')}{_signed(d, '')}" if c else str(d)
    return Problem(f"Solve for x: {_lead(a, 'x')}{_signed(b, '')} = {right}", str(x), f"linear {a} {b} {c} {d}")


def _two_unknowns(dice: Dice) -> Problem:
    x, y = dice.between(-10, 10), dice.between(-10, 10)
    rows = [(dice.between(1, 6), dice.between(1, 6)) for _ in range(2)]
    if rows[0][0] * rows[1][1] == rows[0][1] * rows[1][0]:
        rows[1] = (rows[0][0] + 1, rows[0][1])
    equations = [f"{_lead(a, 'x')}{_signed(b, 'y')} = {a * x + b * y}" for a, b in rows]
    return Problem(f"If {equations[0]} and {equations[1]}, what is x?", str(x), f"two {sorted(equations)}")


def _lead(factor: int, unknown: str) -> str:
    return unknown if factor == 1 else f"{factor}{unknown}"


def _signed(factor: int, unknown: str) -> str:
    """` + 3x`, ` - x`, or nothing for a factor of 0."""
    if factor == 0:
        return ""
    size = "" if abs(factor) == 1 and unknown else str(abs(factor))
    return f" {'-' if factor < 0 else '+'} {size}{unknown}"


# word problems

_NAMES = ("Anna", "Ben", "Chidi", "Dana", "Emil", "Farah", "Goran", "Hana", "Ivan", "Jun", "Kofi", "Lena")
_THINGS = ("apples", "pencils", "stamps", "marbles", "books", "coins", "shells", "cards")
_Maker = Callable[[Dice], tuple[str, int, str]]  # text, answer, the numbers it stands on


def word_problems(level: int, dice: Dice) -> Problem:
    """Small stories that take as many steps as the level says."""
    kind = dice.between(0, len(_STORIES[level]) - 1)
    text, answer, numbers = _STORIES[level][kind](dice)
    return Problem(text, str(answer), f"story {level}.{kind} {numbers}")


def _buys(dice: Dice) -> tuple[str, int, str]:
    name, thing, a, b = dice.pick(_NAMES), dice.pick(_THINGS), dice.between(2, 60), dice.between(2, 60)
    text = f"{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?"
    return text, a + b, f"{sorted((a, b))}"


def _gives(dice: Dice) -> tuple[str, int, str]:
    name, thing, b, rest = dice.pick(_NAMES), dice.pick(_THINGS), dice.between(2, 50), dice.between(1, 50)
    text = f"{name} has {b + rest} {thing} and gives {b} of them away. How many {thing} are left?"
    return text, rest, f"{b + rest} {b}"


def _boxes(dice: Dice) -> tuple[str, int, str]:
    thing, a, b = dice.pick(_THINGS), dice.between(2, 15), dice.between(2, 20)
    return f"There are {b} {thing} in each of {a} boxes. How many {thing} are there in all?", a * b, f"{sorted((a, b))}"


def _change(dice: Dice) -> tuple[str, int, str]:
    name, thing, a, b = dice.pick(_NAMES), dice.pick(_THINGS), dice.between(2, 9), dice.between(2, 12)
    paid = a * b + dice.between(1, 40)
    text = f"{name} buys {a} {thing} at {b} dollars each and pays with {paid} dollars. How many dollars come back?"
    return text, paid - a * b, f"{sorted((a, b))} {paid}"


def _pages(dice: Dice) -> tuple[str, int, str]:
    name, a, b = dice.pick(_NAMES), dice.between(5, 30), dice.between(2, 12)
    whole = a * b + dice.between(5, 150)
    text = f"A book has {whole} pages. {name} reads {a} pages a day for {b} days. How many pages are left to read?"
    return text, whole - a * b, f"{sorted((a, b))} {whole}"


def _bakery(dice: Dice) -> tuple[str, int, str]:
    bakers, loaves, hours = dice.between(2, 8), dice.between(3, 15), dice.between(2, 9)
    burnt = dice.between(1, bakers * loaves * hours // 2)
    text = (
        f"{bakers} bakers each bake {loaves} loaves an hour. They work for {hours} hours, and {burnt} of the loaves "
        "burn. How many good loaves are there?"
    )
    return text, bakers * loaves * hours - burnt, f"{sorted((bakers, loaves, hours))} {burnt}"


def _shares(dice: Dice) -> tuple[str, int, str]:
    friends, each, eaten = dice.between(2, 9), dice.between(2, 15), dice.between(1, 20)
    bags = dice.pick(("2", "3", "4", "5"))
    whole = friends * each + eaten
    loose = whole % int(bags)
    text = (
        f"{dice.pick(_NAMES)} has {bags} bags of {whole // int(bags)} nuts and {loose} loose ones, eats {eaten} of "
        f"them, and shares the rest equally among {friends} friends. How many nuts does each friend get?"
    )
    return text, each, f"{bags} {whole} {eaten} {friends}"


def _sales(dice: Dice) -> tuple[str, int, str]:
    part, rest, price, rent = dice.between(2, 5), dice.between(2, 12), dice.between(2, 9), dice.between(1, 30)
    whole = rest * part * 2
    sold = whole // part
    text = (
        f"A shop has {whole} lamps. On Monday it sells 1/{part} of them, and on Tuesday half of those that are left. "
        f"Each lamp sold brings {price} dollars, and the shop pays {rent} dollars for the two days. How many dollars "
        "does it keep?"
    )
    return text, (sold + (whole - sold) // 2) * price - rent, f"{whole} {part} {price} {rent}"


def _ages(dice: Dice) -> tuple[str, int, str]:
    young, gap, years, factor = dice.between(3, 20), dice.between(2, 12), dice.between(2, 15), dice.between(2, 4)
    first, second, third = dice.pick(_NAMES[:4]), dice.pick(_NAMES[4:8]), dice.pick(_NAMES[8:])
    total = 2 * young + gap
    text = (
        f"{first} is {gap} years older than {second}, and together they are {total} years old. {third} is {factor} "
        f"times as old as {second}. How old will all three be together in {years} years?"
    )
    return text, total + factor * young + 3 * years, f"{young} {gap} {years} {factor}"


_STORIES: dict[int, tuple[_Maker, ...]] = {
    1: (_buys, _gives, _boxes),
    2: (_change, _pages),
    3: (_bakery, _shares),
    4: (_sales,),
    5: (_ages,),
}


# chains of steps


def multi_step(level: int, dice: Dice) -> Problem:
    """A number that is changed level + 1 times."""
    value = start = dice.between(1, 20)
    steps, codes = [], []
    for _ in range(level + 1):
        by = dice.between(2, 12)
        kind = dice.between(0, 3)
        if kind == 3 and abs(value) <= 500:
            value, said = value * (by % 4 + 2), f"multiply it by {by % 4 + 2}"
        elif kind == 2 and value % 2 == 0:
            value, said = value // 2, "halve it"
        elif kind == 1:
            value, said = value - by, f"subtract {by}"
        else:
            value, said = value + by, f"add {by}"
        steps.append(said)
        codes.append(said.replace("halve it", "halve"))
    text = f"Start with {start}. {'. '.join(step.capitalize() for step in steps)}. What number do you get?"
    return Problem(text, str(value), f"steps {start} {codes}")


TOPICS: dict[str, Callable[[int, Dice], Problem]] = {
    "arithmetic": arithmetic,
    "algebra": algebra,
    "word_problems": word_problems,
    "multi_step": multi_step,
}

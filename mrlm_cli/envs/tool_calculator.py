"""A calculator: a parser of its own over exact fractions; nothing is evaluated by Python.

sum     = product {("+" | "-") product}
product = sign {("*" | "/" | "//" | "%") sign}
sign    = ("+" | "-") sign | power
power   = atom ["**" sign]            ("^" is "**")
atom    = number | "(" sum ")" | name "(" sum {"," sum} ")"      names: abs, min, max, floor, sqrt (exact ones)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction

from mrlm_cli.envs.tool_schema import ToolError

MOST_CHARACTERS = 500
MOST_BITS = 4096  # of a numerator or denominator
_TOKEN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?|[a-z]+|\*\*|//|[-+*/%^(),])")


def calculate(expression: str) -> str:
    """The value, exact: a whole number, or a decimal if it is short, else a fraction. Raises ToolError."""
    if len(expression) > MOST_CHARACTERS:
        raise ToolError(f"the expression has more than {MOST_CHARACTERS} characters")
    value = _Parser(expression).whole()
    if value.denominator == 1:
        return str(value.numerator)
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest == 1 and value.denominator.bit_length() <= 32:
        digits = next(n for n in range(1, 64) if 10**n % value.denominator == 0)
        scaled = abs(value.numerator) * 10**digits // value.denominator
        whole, part = divmod(scaled, 10**digits)
        return f"{'-' * (value < 0)}{whole}.{part:0{digits}d}"
    return f"{value.numerator}/{value.denominator}"


class _Parser:
    def __init__(self, text: str) -> None:
        self._tokens: list[str] = []
        at = 0
        text = text.rstrip()
        while at < len(text):
            found = _TOKEN.match(text, at)
            if found is None:
                raise ToolError(
                    f"cannot read {text[at:].strip()[:20]!r} in the expression; use numbers, + - * / // % ** ( )"
                )
            self._tokens.append(found[1])
            at = found.end()
        self._at = 0
        self._depth = 0

    def whole(self) -> Fraction:
        """The value of all tokens."""
        value = self._sum()
        if self._next():
            raise ToolError(f"{self._next()!r} is not expected in the expression")
        return value

    def _next(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self, *wanted: str) -> str:
        token = self._next()
        if token and token in wanted:
            self._at += 1
            return token
        return ""

    def _sum(self) -> Fraction:
        value = self._product()
        while operator := self._take("+", "-"):
            other = self._product()
            value = _bounded(value + other if operator == "+" else value - other)
        return value

    def _product(self) -> Fraction:
        value = self._sign()
        while operator := self._take("*", "/", "//", "%"):
            other = self._sign()
            if operator != "*" and other == 0:
                raise ToolError("division by zero")
            value = _bounded(_PRODUCTS[operator](value, other))
        return value

    def _sign(self) -> Fraction:
        self._depth += 1
        if self._depth > 100:
            raise ToolError("the expression is nested too deeply")
        operator = self._take("+", "-")
        value = self._sign() if operator else self._power()
        self._depth -= 1
        return -value if operator == "-" else value

    def _power(self) -> Fraction:
        base = self._atom()
        if not self._take("**", "^"):
            return base
        exponent = self._sign()
        if exponent.denominator != 1:
            raise ToolError("an exponent must be a whole number; sqrt(x) takes roots")
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(exponent) * bits > MOST_BITS:
            raise ToolError("the result is too large")
        if base == 0 and exponent < 0:
            raise ToolError("division by zero")
        return Fraction(base ** int(exponent))

    def _atom(self) -> Fraction:
        token = self._next()
        self._at += 1
        if token[:1].isdigit():
            return Fraction(token)
        if token == "(":
            value = self._sum()
            self._close()
            return value
        if token.isalpha():
            return self._call(token)
        raise ToolError(f"a number is expected instead of {token!r}" if token else "the expression ends too early")

    def _call(self, name: str) -> Fraction:
        if name not in _FUNCTIONS:
            raise ToolError(f"there is no function {name}; there are {', '.join(_FUNCTIONS)}")
        if not self._take("("):
            raise ToolError(f"write {name}(…)")
        values = [self._sum()]
        while self._take(","):
            values.append(self._sum())
        self._close()
        if name not in ("min", "max") and len(values) != 1:
            raise ToolError(f"{name} takes one number")
        return _FUNCTIONS[name](*values)

    def _close(self) -> None:
        if not self._take(")"):
            raise ToolError("a ) is missing")


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MOST_BITS:
        raise ToolError("the result is too large")
    return value


def _root(value: Fraction) -> Fraction:
    if value < 0:
        raise ToolError("a negative number has no root")
    root = Fraction(math.isqrt(value.numerator), math.isqrt(value.denominator))
    if root * root != value:
        raise ToolError("the root is not a fraction")
    return root


_PRODUCTS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "//": lambda a, b: Fraction(a // b),
    "%": lambda a, b: a % b,
}
_FUNCTIONS: dict[str, Callable[..., Fraction]] = {
    "abs": abs,
    "min": min,
    "max": max,
    "floor": lambda value: Fraction(math.floor(value)),
    "sqrt": _root,
}

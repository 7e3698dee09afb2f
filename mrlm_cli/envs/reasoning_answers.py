"""What an answer may be made of before a scorer of reasoning-gym may see it that has Python evaluate the answer.

Nine of its scorers (0.1.25) call `eval`, or `parse_expr` of sympy, which is `eval` as well: a reply could run any
program outside every sandbox, or name the right answer, which is a variable of the scorer. Two of them, puzzle24 and
intermediate_integration, are refused for other reasons.
"""

from __future__ import annotations

import ast
import re

LONGEST = 300  # characters of an expression
_TOKEN = re.compile(r"\s*(?:(\*\*|[-+*/()])|([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?![A-Za-z_])|([A-Za-z]+)(?![A-Za-z0-9_]))")
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_EXPONENT = re.compile(r"\*\*\s*(?:-?[0-9]{1,2}|\(\s*-?[0-9]{1,2}\s*(?:/\s*[0-9]{1,2}\s*)?\))(?!\s*\*\*)(?![0-9.])")
MOST_POWERS = 3  # of anything but a letter: three times the 99th power is the largest number that comes of it

EXPRESSIONS: dict[str, frozenset[str]] = {
    "countdown": frozenset(),
    "polynomial_multiplication": _LETTERS,
    "simple_integration": _LETTERS,
}
"""Tasks that want an expression, and the names that may stand in it."""
LITERALS: dict[str, re.Pattern[str]] = {
    "binary_matrix": re.compile(r"[0-9\s]*"),
    "n_queens": re.compile(r"[Q_\s]*"),
    "spiral_matrix": re.compile(r"[0-9\s-]*"),
    "string_insertion": re.compile(r"[A-Z]*"),
}
"""Tasks that want a text made so, and also pay for a Python literal."""


def harmless(name: str, answer: str) -> bool:
    """Whether the scorer of the task `name` may see the answer."""
    if name in EXPRESSIONS:
        return len(answer) <= LONGEST and _is_expression(answer.strip(), EXPRESSIONS[name])
    if name in LITERALS:
        return LITERALS[name].fullmatch(answer) is not None or _is_literal(answer.strip())
    return True


def _is_expression(text: str, names: frozenset[str]) -> bool:
    """Whether the text is numbers, these names, + - * / ( ) and, where there are names, small powers."""
    at = powers = 0
    before = ""
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None or (found[3] and found[3] not in names):
            return False
        if found[1] == "**":
            powers += before not in _LETTERS
            if not names or powers > MOST_POWERS or _EXPONENT.match(text, found.start(1)) is None:
                return False
        before = found[0].strip()
        at = found.end()
    return True


def _is_literal(text: str) -> bool:
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False
    return True

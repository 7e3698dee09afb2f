r"""Answers of mathematics in free text: where they stand, and whether two of them are equal.

An answer is looked for in `\boxed{…}` (the last one, braces balanced), between `<answer>` and `</answer>` (the last
pair), or is the last number of the text. Only ASCII digits are numbers.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from fractions import Fraction
from typing import Literal, get_args

from mrlm_cli.errors import MissingExtra

Form = Literal["boxed", "tagged", "last_number"]
FORMS: tuple[Form, ...] = get_args(Form)
LONGEST = 300  # characters of an answer; a longer one is no answer
LAST = 20_000  # characters at the end of a text in which answers are looked for

_BOX = "\\boxed{"
_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,100})"
_DECIMALS = r"\.[0-9]{1,100}"
_NUMBER = re.compile(rf"(?<![0-9./])-?(?:{_DIGITS}(?:{_DECIMALS})?|{_DECIMALS})(?:/[0-9]{{1,100}})?(?![0-9])")
_RATIONAL = re.compile(r"([+-]?)([0-9]{0,100})(?:\.([0-9]{1,100}))?(?:/([0-9]{1,100}))?")
_FRACTION = re.compile(r"\\[dt]?frac\{(-?[0-9]{1,100})\}\{([0-9]{1,100})\}")
_DROPPED = ("\\left", "\\right", "\\,", "\\!", "\\;", "\\ ", "\\$", "$", "\\%", "%", "\\(", "\\)", "\\[", "\\]")
_OPERATIONS = re.compile(r"[+*^]|.-|\\times|\\cdot|\\div|[0-9)]\s*\(")


def extract(text: str, form: Form, longest: int = LONGEST) -> str | None:
    """The last answer that stands in the form, without surrounding blanks; None if there is none, or one of more than
    `longest` characters."""
    text = text[-LAST:]
    if form == "boxed":
        found = _boxed(text)
    elif form == "tagged":
        tags = _TAG.findall(text)
        found = tags[-1] if tags else None
    else:
        numbers = _NUMBER.findall(text)
        found = numbers[-1] if numbers else None
    found = found.strip() if found is not None else None
    return found if found and len(found) <= longest else None


def anywhere(text: str, first: Form) -> str | None:
    """The answer in the form `first`, or else in any other."""
    for form in (first, *FORMS):
        found = extract(text, form)
        if found is not None:
            return found
    return None


def _boxed(text: str) -> str | None:
    start = text.rfind(_BOX)
    if start < 0:
        return None
    start += len(_BOX)
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return None


def rational(answer: str) -> Fraction | None:
    r"""The value of a whole number, decimal or fraction (`1,234`, `-.5`, `3/4`, `\frac{3}{4}`, `x = 5`), or None."""
    text = _FRACTION.sub(r"\1/\2", normal(answer))
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?:[^0-9]|$))", "", text)
    found = _RATIONAL.fullmatch(text)
    if found is None or not (found[2] or found[3]):
        return None
    sign, whole, decimals, divisor = found[1], found[2] or "0", found[3] or "", int(found[4] or 1)
    if divisor == 0:
        return None
    value = Fraction(int(whole + decimals), 10 ** len(decimals) * divisor)
    return -value if sign == "-" else value


def normal(answer: str) -> str:
    r"""The answer without blanks, dollars, percent signs, a final full stop, `\text{}`, or a leading `x =`."""
    text = answer.strip()
    for mark in _DROPPED:
        text = text.replace(mark, "")
    text = re.sub(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}", r"\1", text)
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = re.sub(r"\s+", "", text).removesuffix(".")
    return re.sub(r"^[A-Za-z]=", "", text)


def equal(gold: str, answer: str) -> bool:
    """Whether two answers are the same rational number, or, if the right one is none, the same normalised text."""
    wanted = rational(gold)
    return rational(answer) == wanted if wanted is not None else normal(answer) == normal(gold)


def import_math_verify() -> None:
    """So that the first answer to be judged does not wait for it."""
    import math_verify  # noqa: F401 (others use it)


def verified(gold: str, answer: str) -> bool:
    """Whether two answers are equal to math-verify (extra `math`), which knows roots, sets, intervals and units.

    It may take arbitrarily long: call it where a deadline holds. If the right answer is a number, an expression that
    has yet to be evaluated, such as 2 + 1 for 3, is not equal to it.
    """
    if rational(gold) is not None and _OPERATIONS.search(normal(answer)):
        return False
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns at every call that it has no deadline
    parsed = [parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer)]
    return bool(verify(*parsed, timeout_seconds=None))


def require_math_verify() -> None:
    """Raises MissingExtra if math-verify is not installed; does not import it, which takes long."""
    if importlib.util.find_spec("math_verify") is None:
        raise MissingExtra("the checker math_verify", "math")

"""Values that leave a sandbox: read without running anything, compared by type and value."""

from __future__ import annotations

import math
from typing import Any

from mrlm_cli.envs.sandbox.records import Opaque

_MOST_DEPTH = 100


def decode(form: Any, depth: int = 0) -> Any:
    """The value that the program's interpreter wrote as [tag, …]. Raises ValueError for anything else.

    What has no plain form comes back as Opaque.
    """
    if depth > _MOST_DEPTH or not isinstance(form, list) or not form or not isinstance(form[0], str):
        raise ValueError("not a value")
    tag, *rest = form
    try:
        match tag, rest:
            case "n", []:
                return None
            case "b", [bool() as flag]:
                return flag
            case "i", [str() as digits]:
                return int(digits, 16)
            case "f", [str() as digits]:
                return float.fromhex(digits)
            case "c", [str() as real, str() as imaginary]:
                return complex(float.fromhex(real), float.fromhex(imaginary))
            case "s", [str() as text]:
                return text
            case "y", [str() as digits]:
                return bytes.fromhex(digits)
            case "l", [list() as items]:
                return [decode(item, depth + 1) for item in items]
            case "t", [list() as items]:
                return tuple(decode(item, depth + 1) for item in items)
            case "e", [list() as items]:
                return {decode(item, depth + 1) for item in items}
            case "d", [list() as pairs]:
                return {decode(key, depth + 1): decode(value, depth + 1) for key, value in pairs}
            case "o", [str() as name]:
                return Opaque(name)
    except (TypeError, OverflowError) as error:  # an unhashable key, a pair that is none, a float out of range
        raise ValueError(str(error)) from error
    raise ValueError("not a value")


def same(expected: Any, actual: Any, tolerance: float = 1e-9) -> bool:
    """Equal in type and value, all the way down; floats within `tolerance`, relative above 1 and absolute below.

    True is not 1, 2 is not 2.0, a list is not a tuple; NaN is NaN.
    """
    if type(expected) is not type(actual) or isinstance(actual, Opaque):
        return False
    if isinstance(expected, float):
        if math.isnan(expected) or math.isinf(expected):
            return bool(expected == actual or (math.isnan(expected) and math.isnan(actual)))
        return abs(expected - actual) <= tolerance * max(1.0, abs(expected))
    if isinstance(expected, complex):
        return same(expected.real, actual.real, tolerance) and same(expected.imag, actual.imag, tolerance)
    if isinstance(expected, list | tuple):
        return len(expected) == len(actual) and all(
            same(a, b, tolerance) for a, b in zip(expected, actual, strict=True)
        )
    if isinstance(expected, dict):
        return len(expected) == len(actual) and all(
            key in actual and same(value, actual[key], tolerance) for key, value in expected.items()
        )
    if isinstance(expected, set):
        return len(expected) == len(actual) and _typed(expected) == _typed(actual)
    return bool(expected == actual)


def _typed(items: set[Any]) -> set[tuple[str, Any]]:
    """Items with the names of their types, since 1, 1.0 and True are one member of a plain set."""
    return {(type(item).__name__, item) for item in items}

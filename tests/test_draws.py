"""Draws are functions of their parts, and fair."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from mrlm_cli.draws import draw_key, integer, permuted, shuffled, uniforms


def test_parts_are_told_apart() -> None:
    keys = [draw_key("a", "bc"), draw_key("ab", "c"), draw_key("abc"), draw_key(1, 2), draw_key(12), draw_key("1", 2)]
    assert len(set(keys)) == len(keys)
    assert draw_key("a", 1) == draw_key("a", 1)


def test_known_values_never_change() -> None:
    """Runs must resume under later versions: these numbers are part of the format of a run."""
    assert draw_key(0, "x").hex() == "50655876c316d53161ef8d8893457c78"
    assert uniforms(draw_key(0, "x"), 3) == (0.6664991600900744, 0.5674661218323219)
    assert shuffled(range(8), "order", 1) == [7, 4, 2, 5, 1, 6, 3, 0]


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    drawn = np.array([uniforms(draw_key("u"), position) for position in range(20_000)])
    assert ((drawn >= 0) & (drawn < 1)).all()
    counts = np.stack([np.histogram(drawn[:, i], bins=20, range=(0, 1))[0] for i in (0, 1)])
    assert (((counts - 1000) ** 2 / 1000).sum(1) < 43.8).all()  # chi-square, 19 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.025
    assert abs(np.corrcoef(drawn[:-1, 0], drawn[1:, 0])[0, 1]) < 0.025


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 1000])
def test_permuted_is_a_permutation(size: int) -> None:
    assert sorted(permuted(index, size, "p", size) for index in range(size)) == list(range(size))


def test_permuted_refuses_what_is_outside() -> None:
    for index in (-1, 5):
        with pytest.raises(ValueError, match="outside"):
            permuted(index, 5, "p")


def test_every_order_of_four_comes_about_as_often() -> None:
    counts = dict.fromkeys(permutations(range(4)), 0)
    for number in range(4800):
        counts[tuple(shuffled(range(4), "orders", number))] += 1
    assert min(counts.values()) > 120
    assert max(counts.values()) < 290


def test_integer_is_inside_its_bound_and_even() -> None:
    drawn = [integer(10, "i", number) for number in range(10_000)]
    assert set(drawn) == set(range(10))
    assert max(abs(drawn.count(value) - 1000) for value in range(10)) < 120

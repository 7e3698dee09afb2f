"""Curves: a series of bounded size, and its drawing in rows of characters."""

from __future__ import annotations

import math
from itertools import pairwise

_LIMIT = 1024  # points kept; more than any terminal has columns of dots
_BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # dot of (row, column) in a cell of 4 x 2


class Series:
    """Points (x, y) in rising x. When there are many, neighbours are averaged in pairs, so drawing stays cheap."""

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []
        self._merged = 1  # points of the run in each full entry
        self._open: list[tuple[float, float]] = []  # not yet enough for an entry

    def add(self, x: float, y: float) -> None:
        """Add a finite point."""
        self._open.append((x, y))
        if len(self._open) < self._merged:
            return
        self.points.append(_mean(self._open))
        self._open = []
        if len(self.points) >= _LIMIT:
            self.points = [_mean(self.points[start : start + 2]) for start in range(0, len(self.points), 2)]
            self._merged *= 2

    def span(self) -> tuple[float, float]:
        """Lowest and highest y; (0, 0) without points."""
        values = [y for _, y in self.points]
        return (min(values), max(values)) if values else (0.0, 0.0)


def plot(
    points: list[tuple[float, float]],
    width: int,
    height: int,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    unicode: bool = True,
) -> list[str]:
    """The line through `points` as `height` rows of `width` characters, in braille dots or (without Unicode) stars."""
    across, down = (2, 4) if unicode else (1, 1)
    columns, rows = width * across, height * down
    heights = _sampled(points, columns, x_range)
    low, high = y_range
    scale = (rows - 1) / (high - low) if high > low else 0.0
    dots = [[False] * columns for _ in range(rows)]
    before: int | None = None
    for column, value in enumerate(heights):
        if value is None:
            continue
        row = rows - 1 - min(rows - 1, max(0, round((value - low) * scale)))
        first = row if before is None or before == row else before + (1 if row > before else -1)
        for between in range(min(first, row), max(first, row) + 1):  # no gap in a steep line
            dots[between][column] = True
        before = row
    if not unicode:
        return ["".join("*" if dot else " " for dot in line) for line in dots]
    return [
        "".join(
            chr(0x2800 + sum(_BRAILLE[r][c] for r in range(4) for c in range(2) if dots[top + r][left + c]))
            for left in range(0, columns, 2)
        )
        for top in range(0, rows, 4)
    ]


def _sampled(points: list[tuple[float, float]], columns: int, x_range: tuple[float, float]) -> list[float | None]:
    """The line's height at every column, straight between points; None outside the first and the last."""
    low, high = x_range
    width = max(high - low, 1e-12)
    binned: dict[int, list[float]] = {}
    for x, y in points:
        column = min(columns - 1, max(0, math.floor((x - low) / width * (columns - 1) + 0.5)))
        binned.setdefault(column, []).append(y)
    known = [(column, sum(values) / len(values)) for column, values in sorted(binned.items())]
    heights: list[float | None] = [None] * columns
    for (left, a), (right, b) in pairwise(known):
        for column in range(left, right):
            heights[column] = a + (b - a) * (column - left) / (right - left)
    if known:
        heights[known[-1][0]] = known[-1][1]
    return heights


def _mean(points: list[tuple[float, float]]) -> tuple[float, float]:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)

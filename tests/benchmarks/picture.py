"""Curves on two logarithmic axes as an SVG text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#1b6ca8", "#c8553d", "#2e8b57", "#8e5ea2", "#b8860b", "#555555", "#e377c2", "#17a2b8")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 330, 280, 58, 44, 12  # of a panel and its margins, in pixels


@dataclass(frozen=True, slots=True)
class Panel:
    """Curves of positive numbers over positive numbers."""

    x_label: str
    y_label: str
    curves: Mapping[str, Sequence[tuple[float, float]]]


def of(panels: Sequence[Panel]) -> str:
    """The panels beside one another, one legend below."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    rows = -(-len(names) // 3)
    width, height = WIDTH * len(panels), HEIGHT + 18 * rows + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, panel in enumerate(panels):
        parts += [f'<g transform="translate({number * WIDTH},0)">', *_panel(panel, colours), "</g>"]
    for number, name in enumerate(names):
        x, y = LEFT + number % 3 * width // 3, HEIGHT + 14 + 18 * (number // 3)
        parts.append(
            f'<line x1="{x}" x2="{x + 20}" y1="{y - 4}" y2="{y - 4}" stroke="{colours[name]}" stroke-width="2"/>'
        )
        parts.append(f'<text x="{x + 26}" y="{y}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, colours: Mapping[str, str]) -> list[str]:
    points = [point for curve in panel.curves.values() for point in curve]
    if not points:
        return []
    (x_low, x_high), (y_low, y_high) = (_decades([point[axis] for point in points]) for axis in (0, 1))
    right, low = WIDTH - 12, HEIGHT - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - x_low) / (x_high - x_low)
        up = (math.log10(y) - y_low) / (y_high - y_low)
        return LEFT + across * (right - LEFT), low - up * (low - TOP)

    parts = [f'<rect x="{LEFT}" y="{TOP}" width="{right - LEFT}" height="{low - TOP}" fill="none" stroke="#999"/>']
    for power in range(x_low, x_high + 1):
        x, _ = place(10.0**power, 10.0**y_low)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{low}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{low + 14}" text-anchor="middle">{10.0**power:g}</text>')
    for power in range(y_low, y_high + 1):
        _, y = place(10.0**x_low, 10.0**power)
        parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{10**power:,}</text>')
    for name, curve in panel.curves.items():
        drawn = [place(x, y) for x, y in curve]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colours[name]}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colours[name]}"/>' for x, y in drawn]
    middle = (LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{low + 32}" text-anchor="middle">{escape(panel.x_label)}</text>')
    parts.append(
        f'<text x="13" y="{(TOP + low) / 2}" text-anchor="middle" transform="rotate(-90 13 {(TOP + low) / 2})">'
        f"{escape(panel.y_label)}</text>"
    )
    return parts


def _decades(values: Sequence[float]) -> tuple[int, int]:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)

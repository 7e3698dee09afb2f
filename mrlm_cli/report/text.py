"""Text for a terminal: numbers and durations in few characters, and what a model wrote made harmless."""

from __future__ import annotations

import unicodedata

from rich.cells import cell_len, set_cell_size

from mrlm_cli.records import Episode, Message

_SOURCE_LIMIT = 4000  # characters of a message looked at: more never fits a line
_MARKS_IN_A_ROW = 2  # combining marks on one letter that are shown; stacks of them spill over other lines


def duration(seconds: float) -> str:
    """8s, 2m10s, 1h05m, 3d04h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def number(value: float) -> str:
    """Three significant digits, without an exponent where that stays short: 0.47, 12.3, 0.004, 2e-06."""
    if value == 0:
        return "0"
    if 0.001 <= abs(value) < 1:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def printable(text: str) -> str:
    """`text` on one line without control, format, surrogate, private or unassigned characters: those are escaped."""
    shown = []
    marks = 0
    for character in text:
        category = unicodedata.category(character)
        marks = marks + 1 if category in ("Mn", "Me") else 0
        if character == "\n":
            shown.append("\\n")
        elif category == "Zs":
            shown.append(" ")
        elif category[0] == "C" or category in ("Zl", "Zp") or marks > _MARKS_IN_A_ROW:
            shown.append(character.encode("unicode_escape", "surrogatepass").decode("ascii"))
        else:
            shown.append(character)
    return "".join(shown)


def shorten(text: str, cells: int, gap: str = "…") -> str:
    """`text` made printable and cut in its middle, where `gap` (one cell) stands, to at most `cells` terminal cells."""
    if len(text) > _SOURCE_LIMIT:
        text = text[: _SOURCE_LIMIT // 2] + gap + text[-_SOURCE_LIMIT // 2 :]
    text = printable(text)
    if cell_len(text) <= cells:
        return text
    if cells < 3:
        return set_cell_size(text, max(0, cells)).rstrip()
    head = (cells - 1) // 2
    tail = text[-(cells - 1 - head) :]
    while cell_len(tail) > cells - 1 - head:
        tail = tail[1:]
    return set_cell_size(text, head).rstrip() + gap + tail


def conversation(episode: Episode) -> tuple[str, str]:
    """(what was asked first, everything after it) of an episode's own view; later turns are joined by bars."""
    view = episode.transcript.views.get(episode.agent, ())
    first = next((index for index, message in enumerate(view) if message.role == "assistant"), len(view))
    asked = " ".join(message.content for message in view[:first] if message.role != "system")
    return asked, " | ".join(map(_said, view[first:]))


def _said(message: Message) -> str:
    return message.content if message.content else "(nothing)"

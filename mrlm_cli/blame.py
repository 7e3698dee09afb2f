"""Where in a person's own code an exception came from: what to show of a traceback that is mostly ours."""

from __future__ import annotations

import sysconfig
import traceback
from functools import cache
from pathlib import Path

debug = False  # set by --debug: whole tracebacks are printed
LINES = 3  # frames that are shown
LONGEST = 20_000  # characters of a traceback that is kept


def last(error: BaseException) -> traceback.FrameSummary | None:
    """The last frame in a person's own file, or the very last one; None for an exception that was never raised."""
    frames = _own(error) or traceback.extract_tb(error.__traceback__)
    return frames[-1] if frames else None


def place(error: BaseException) -> str:
    """`my_env.py:41 in step`: the last frame in a person's own file; empty if there is none."""
    frames = _own(error)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""


def lines(error: BaseException) -> list[str]:
    """The last frames in a person's own files, or the very last ones if there are none, each with its line of code."""
    frames = _own(error) or traceback.extract_tb(error.__traceback__)
    return [f"{each.filename}:{each.lineno} in {each.name}: {each.line or '?'}" for each in frames[-LINES:]]


def whole(error: BaseException) -> str:
    """The traceback as Python prints it, its beginning cut if it is very long."""
    return "".join(traceback.format_exception(error))[-LONGEST:]


def _own(error: BaseException) -> list[traceback.FrameSummary]:
    return [frame for frame in traceback.extract_tb(error.__traceback__) if _is_own(frame.filename)]


@cache
def _is_own(filename: str) -> bool:
    """Whether a file is neither this package's, nor installed, nor of the standard library."""
    file = Path(filename)
    ours = Path(__file__).parent
    if file.is_relative_to(ours):
        return file.is_relative_to(ours / "_shipped")
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    return file.is_file() and not any(file.is_relative_to(sysconfig.get_path(name)) for name in names)

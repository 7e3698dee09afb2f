"""What goes into a sandbox and what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Form = Literal["calls", "stdin"]
Kind = Literal["value", "printed", "error", "syntax", "time", "memory", "output", "died"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one run; all tests of a job share them."""

    wall_seconds: float = 10.0  # from the program's start to its end
    cpu_seconds: int = 5  # of each process
    test_seconds: float = 2.0  # CPU time of one test, kept by the program's own interpreter
    memory_mib: int = 256  # address space of each process, and where there is a cgroup memory of all together
    processes: int = 16  # at one time, threads included
    disk_mib: int = 16  # of the private /tmp
    output_kib: int = 256  # of all results together, and of what one test prints


@dataclass(frozen=True, slots=True)
class Call:
    """Call the entry with these arguments: None, bool, int, float, complex, str, bytes, tuple, list, set, dict."""

    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Feed:
    """Run the program as a script with this text on its standard input."""

    stdin: str


@dataclass(frozen=True, slots=True)
class Job:
    """A Python program and its tests: all `Call`s of the function `entry` (form calls), or all `Feed`s (form stdin)."""

    program: str
    form: Form
    tests: tuple[Call | Feed, ...]
    entry: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """What one test came to.

    `value` and `printed` are the program's own words, the rest says why there are none: an exception (`error`), a text
    that is no Python (`syntax`), or a limit that ended it. `text` is fit for feedback, with the program's line number.
    """

    kind: Kind
    value: Any = None  # for kind "value"
    text: str = ""
    line: int = 0  # of the program, for an error or syntax error; 0 if it is not known


@dataclass(frozen=True, slots=True)
class Opaque:
    """A value of a type that does not leave the sandbox; it equals nothing that a test expects."""

    type_name: str

"""The built-in tools of one session, and what they hold: notes, files in a private directory, documents."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from mrlm_cli.envs.sandbox.box import Sandbox
from mrlm_cli.envs.sandbox.records import Feed, Job, Limits
from mrlm_cli.envs.starting import working_time
from mrlm_cli.envs.tool_calculator import calculate
from mrlm_cli.envs.tool_schema import MOST_ANSWER, LateTool, Offered, Tool, ToolError
from mrlm_cli.errors import MissingExtra, SessionFailure

MOST_KEPT = 100  # notes, and files
MOST_TEXT = 20_000  # characters of a note or file
_FUNCTIONS = {
    "notes": ("read_note", "write_note", "list_notes"),
    "files": ("read_file", "write_file", "list_files"),
}  # tools that are more than the function of their name
_NO_TIME = "no time is left for calls in this reply"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class Box:
    """Tools by name, over what a session starts with. `close` removes its directory.

    `sandbox` is needed for the tool python alone, and the extra `search` for the tool search. `others` are offered
    beside the built-in ones; with `only`, none but the tools of these names. Raises MissingExtra, and SessionFailure
    where two tools share a name or one of `only` is not there.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        notes: Mapping[str, str],
        files: Mapping[str, str],
        documents: Sequence[str],
        sandbox: Sandbox | None,
        limits: Limits,
        others: Iterable[Offered] = (),
        only: Sequence[str] | None = None,
    ) -> None:
        self._notes = dict(notes)
        self._folder = tempfile.TemporaryDirectory(prefix="mrlm-tools-") if "files" in names else None
        self._sandbox, self._limits = sandbox, limits
        self._documents = documents
        self._rank = _ranking(documents) if "search" in names else None
        functions: list[Callable[..., str]] = [getattr(self, each) for each in names_of(names)]
        self.tools: dict[str, Offered] = {}
        for tool in (*map(Tool.of, functions), *others):
            if tool.name in self.tools:
                raise SessionFailure(f"two tools are called {tool.name!r}")
            self.tools[tool.name] = tool
        if only is not None:
            if missing := sorted(set(only) - self.tools.keys()):
                raise SessionFailure(f"no tool is called {missing[0]!r}; there are {', '.join(self.tools)}")
            self.tools = {name: tool for name, tool in self.tools.items() if name in only}
        longest = [tool.deadline for tool in self.tools.values() if tool.deadline < math.inf]
        if sandbox is not None:
            longest.append(limits.wall_seconds)
        self._allowed = max(longest, default=math.inf)  # seconds for all calls of one reply
        self.begin()
        for name, text in files.items():
            self.write_file(name, text)

    def close(self) -> None:
        """Remove the private directory."""
        if self._folder is not None:
            self._folder.cleanup()

    def begin(self) -> None:
        """A new reply: all its calls share the time that the slowest tool may take, or many would miss a deadline that
        fails their session."""
        self._until = working_time() + self._allowed
        self._called = False  # whether time was spent already

    def answer(self, name: str, arguments: Any) -> str:
        """What a tool says, cut if it is long. Raises ToolError, SessionFailure."""
        if name not in self.tools:
            raise ToolError(f"there is no tool {name[:60]!r}; there are {', '.join(self.tools)}")
        tool, left = self.tools[name], self._left()
        if left <= 0:
            raise LateTool(_NO_TIME)
        alone = tool.deadline <= left or not self._called
        self._called = True
        try:
            text = tool.call(arguments, min(tool.deadline, left))
        except LateTool:
            late = f"call took longer than {tool.deadline:g} s"
            together = f"calls of this reply took longer than {self._allowed:g} s"
            raise LateTool(f"{name}: the {late if alone else together}") from None
        return text if len(text) <= MOST_ANSWER else text[:MOST_ANSWER] + " …"

    def calculator(self, expression: Annotated[str, "for example (12 + 3) * 7 // 2"]) -> str:
        """Work out an arithmetic expression exactly, with + - * / // % ** ( ), abs, min, max, floor and sqrt."""
        return calculate(expression)

    def python(self, program: Annotated[str, "a Python program that prints what you want to know"]) -> str:
        """Run a Python program without files or network, and see what it prints."""
        assert self._sandbox is not None
        seconds = min(self._limits.wall_seconds, self._left())
        job, limits = Job(program, "stdin", (Feed(""),)), replace(self._limits, wall_seconds=seconds)
        (result,) = self._sandbox.run(job, limits)
        if result.kind == "printed":
            return result.text or "(nothing was printed)"
        raise ToolError(f"{result.text}{f' (line {result.line})' if result.line else ''}")

    def search(self, query: Annotated[str, "words to look for"]) -> str:
        """Find the three documents that fit the query best."""
        assert self._rank is not None
        found = self._rank(query[:MOST_TEXT])
        return "\n".join(f"- {self._documents[i]}" for i in found) or "(no document has these words)"

    def write_note(self, key: str, text: str) -> str:
        """Keep a text in the notebook under a key."""
        _check_size(text, len(self._notes) - (key in self._notes), "notes")
        self._notes[key] = text
        return f"noted under {key[:60]}"

    def read_note(self, key: str) -> str:
        """Read what the notebook holds under a key."""
        if key not in self._notes:
            raise ToolError(f"no note {key[:60]!r}; list_notes gives the keys")
        return self._notes[key]

    def list_notes(self) -> str:
        """List the keys of the notebook."""
        return ", ".join(sorted(self._notes)) or "(no notes)"

    def write_file(self, name: str, text: str) -> str:
        """Write a text file in the private directory."""
        path = self._path(name)
        _check_size(text, len(list(path.parent.iterdir())) - path.exists(), "files")
        path.write_text(text, encoding="utf-8", errors="replace")
        return f"wrote {name}"

    def read_file(self, name: str) -> str:
        """Read a text file of the private directory."""
        path = self._path(name)
        if not path.is_file():
            raise ToolError(f"no file {name!r}; list_files gives the names")
        return path.read_text(encoding="utf-8")

    def list_files(self) -> str:
        """List the files of the private directory."""
        assert self._folder is not None
        return ", ".join(sorted(path.name for path in Path(self._folder.name).iterdir())) or "(no files)"

    def _left(self) -> float:
        return self._until - working_time()

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):  # neither a path nor a hidden file, so nothing outside the directory
            raise ToolError("a file's name is made of at most 64 letters, digits, _ . and -, and is no path")
        assert self._folder is not None
        return Path(self._folder.name) / name


def names_of(tools: Sequence[str]) -> list[str]:
    """Names of the functions that built-in tools consist of, in order."""
    return [name for tool in tools for name in _FUNCTIONS.get(tool, (tool,))]


def _check_size(text: str, kept: int, what: str) -> None:
    if len(text) > MOST_TEXT:
        raise ToolError(f"the text has more than {MOST_TEXT} characters")
    if kept >= MOST_KEPT:
        raise ToolError(f"there are {MOST_KEPT} {what} already")


def require_search() -> None:
    """Raises MissingExtra."""
    try:
        import bm25s  # noqa: F401 (whether it is there)
    except ImportError as error:
        raise MissingExtra("the tool search", "search") from error


def _ranking(documents: Sequence[str]) -> Callable[[str], list[int]]:
    """The best three documents for a query, by BM25 (Robertson and Zaragoza 2009); none that shares no word."""
    require_search()
    import bm25s

    index = bm25s.BM25()
    index.index([_words(document) for document in documents], show_progress=False)
    known = {word for document in documents for word in _words(document)}

    def rank(query: str) -> list[int]:
        words = [word for word in _words(query) if word in known]
        if not words:
            return []
        found, scores = index.retrieve([words], k=min(3, len(documents)), show_progress=False)
        return [int(i) for i, score in zip(found[0], scores[0], strict=True) if score > 0]

    return rank


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())

"""YAML text → a tree of values that know their line and column.

Read from parse events, so that depth and size are bounded before anything is built. Scalars follow the core schema of
YAML 1.2: `no` and `12:30` are text, `1e-5` is a number. Refused: duplicate keys, tabs, tags, more than one document,
NaN and infinity, aliases that contain themselves or multiply beyond `LARGEST` values.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import yaml

from mrlm_cli.errors import RecipeError

DEEPEST = 32  # levels of nesting
LARGEST = 10_000  # values in a file, aliases written out
LONGEST = 1_000_000  # characters in a file
_INTEGER = re.compile(r"[-+]?[0-9]{1,300}|0o[0-7]{1,300}|0x[0-9a-fA-F]{1,300}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS = {"": None, "~": None, "null": None, "Null": None, "NULL": None} | {
    word: word.lower() == "true" for word in ("true", "True", "TRUE", "false", "False", "FALSE")
}

Scalar = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Mark:
    """Where something was written; lines and columns count from 1, line 0 is a command line's override."""

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else f"override {self.source}"

    @property
    def overridden(self) -> str | None:
        """The key of the override in which this was written."""
        return None if self.line else self.source.partition("=")[0]

    def says(self, path: str, text: str) -> str:
        """One problem's line; the path is left out where the override already names it."""
        separator = "" if not path or path == self.overridden else f": {path}" if self.overridden else f" {path}"
        return f"{self}{separator}: {text}"

    @property
    def origin(self) -> str:
        """`file:line`, or `override`."""
        return f"{self.source}:{self.line}" if self.line else "override"


@dataclass(frozen=True, slots=True)
class Node:
    """A value with its place, and the place of the key that names it."""

    value: Scalar | dict[str, Node] | list[Node]
    mark: Mark
    key: Mark | None = None
    size: int = 1  # values in it, itself included

    @property
    def name_mark(self) -> Mark:
        """Where its key stands; its own place in a list or at the top."""
        return self.key or self.mark

    @property
    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {name: node.plain for name, node in self.value.items()}
        return [node.plain for node in self.value] if isinstance(self.value, list) else self.value


def plain_scalar(text: str) -> Scalar:
    """What an unquoted scalar means in YAML 1.2's core schema; NaN and infinities come back as such."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if _FLOAT.fullmatch(text):
        return float(text)
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return text


def decode(data: bytes, source: str) -> str:
    """UTF-8 text. Raises RecipeError at the first byte that is not."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8-sig", errors="replace")
        mark = Mark(source, before.count("\n") + 1, len(before) - before.rfind("\n"))
        raise RecipeError(f"{mark}: byte 0x{data[error.start]:02x} is not UTF-8 text") from error


def read(text: str, source: str, *, override: bool = False) -> Node:
    """The tree of one YAML document, of any type. Raises RecipeError with file, line and column."""
    if len(text) > LONGEST:
        raise RecipeError(f"{Mark(source, 1, 1)}: longer than {LONGEST:,} characters; this is no recipe")
    return _Builder(text, source, override).document()


class _Builder:
    def __init__(self, text: str, source: str, override: bool) -> None:
        self._source = source
        self._override = override
        self._text = text
        self._duplicates: list[str] = []
        self._anchors: dict[str, Node | None] = {}  # None while the anchored value is still open
        try:
            self._loader = yaml.SafeLoader(text)
        except yaml.reader.ReaderError as error:
            before = text[: error.position]
            mark = Mark(source, before.count("\n") + 1, error.position - before.rfind("\n"))
            raise self._wrong(mark, f"character {error.character:#x} is not allowed") from error

    def document(self) -> Node:
        self._next()  # the stream's start
        start = self._next()
        if isinstance(start, yaml.StreamEndEvent):
            if self._override:
                return Node(None, Mark(self._source))
            raise self._wrong(Mark(self._source, 1, 1), "the file is empty; expected a mapping of keys to values")
        node = self._node(self._next(), [], None)
        self._next()  # the document's end
        after = self._next()
        if not isinstance(after, yaml.StreamEndEvent):
            raise self._wrong(self._mark(after), "a second document starts here; a recipe is one document")
        if self._duplicates:
            raise RecipeError("\n".join(self._duplicates))
        return node

    def _next(self) -> Any:
        try:
            return self._loader.get_event()
        except yaml.MarkedYAMLError as error:
            place = error.problem_mark or error.context_mark
            raise self._wrong(self._at(place), self._syntax(error, place)) from error
        except (ValueError, OverflowError) as error:  # PyYAML converts escapes and versions unchecked
            where = self._at(self._loader.get_mark())
            raise self._wrong(where, "not valid YAML: an escape or a version number is out of range") from error

    def _syntax(self, error: yaml.MarkedYAMLError, place: Any) -> str:
        problem = str(error.problem or error.context or "not valid YAML")
        if place is not None and self._text[place.index : place.index + 1] == "\t":
            return "a tab; indent and separate with spaces"
        context = f" {error.context}" if error.context and error.problem else ""
        return f"not valid YAML: {problem}{context}"

    def _node(self, event: Any, path: list[str], key: Mark | None) -> Node:
        mark = self._mark(event)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(str(event.anchor), mark, path, key)
        if event.tag is not None:
            raise self._wrong(mark, f"tag {event.tag} is not allowed; write a plain value", path)
        if len(path) >= DEEPEST and not isinstance(event, yaml.ScalarEvent):
            raise self._wrong(mark, f"nested deeper than {DEEPEST} levels")
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            node = Node(self._scalar(event, mark, path), mark, key)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = self._sequence(mark, path, key)
        else:
            node = self._mapping(mark, path, key)
        if node.size > LARGEST:
            raise self._wrong(mark, f"more than {LARGEST:,} values, aliases written out; this is no recipe", path)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return node

    def _alias(self, name: str, mark: Mark, path: list[str], key: Mark | None) -> Node:
        if name not in self._anchors:
            raise self._wrong(mark, f"alias *{name} has no anchor before it", path)
        node = self._anchors[name]
        if node is None:
            raise self._wrong(mark, f"alias *{name} stands inside its own anchor", path)
        if len(path) + _depth(node) > DEEPEST:
            raise self._wrong(mark, f"nested deeper than {DEEPEST} levels")
        return Node(node.value, mark, key, node.size)

    def _scalar(self, event: Any, mark: Mark, path: list[str]) -> Scalar:
        text = self._characters(event, mark, path)
        if event.style is not None:
            return text
        value = plain_scalar(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise self._wrong(mark, f"got {text[:60]}; expected a finite number", path)
        return value

    def _sequence(self, mark: Mark, path: list[str], key: Mark | None) -> Node:
        items: list[Node] = []
        size = 1
        while not isinstance(event := self._next(), yaml.SequenceEndEvent):
            items.append(self._node(event, [*path, str(len(items))], None))
            size += items[-1].size
            self._bounded(size, mark, path)
        return Node(items, mark, key, size)

    def _mapping(self, mark: Mark, path: list[str], key: Mark | None) -> Node:
        items: dict[str, Node] = {}
        size = 1
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            place = self._mark(event)
            if not isinstance(event, yaml.ScalarEvent) or event.tag is not None or not event.value:
                raise self._wrong(place, "a key must be plain text", path)
            name = self._characters(event, place, path)
            inner = [*path, name]
            if name in items:
                first = items[name].name_mark.line
                where = "in this override" if self._override else f"at line {first}"
                self._duplicates.append(place.says(".".join(inner), f"the key appears twice; first {where}"))
            items[name] = self._node(self._next(), inner, place)
            size += items[name].size
            self._bounded(size, mark, path)
        return Node(items, mark, key, size)

    def _characters(self, event: Any, mark: Mark, path: list[str]) -> str:
        text: str = event.value
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise self._wrong(mark, "half of a surrogate pair is not text", path)
        return text

    def _bounded(self, size: int, mark: Mark, path: list[str]) -> None:
        if size > LARGEST:
            raise self._wrong(mark, f"more than {LARGEST:,} values, aliases written out; this is no recipe", path)

    def _mark(self, event: Any) -> Mark:
        return self._at(event.start_mark)

    def _at(self, place: Any) -> Mark:
        if self._override:
            return Mark(self._source)
        return Mark(self._source, place.line + 1, place.column + 1) if place else Mark(self._source, 1, 1)

    def _wrong(self, mark: Mark, text: str, path: list[str] | None = None) -> RecipeError:
        key = "" if self._override else ".".join(path or [])
        return RecipeError("\n".join([*self._duplicates, mark.says(key, text)]))


def _depth(node: Node) -> int:
    if isinstance(node.value, dict):
        return 1 + max(map(_depth, node.value.values()), default=0)
    return 1 + max(map(_depth, node.value), default=0) if isinstance(node.value, list) else 0

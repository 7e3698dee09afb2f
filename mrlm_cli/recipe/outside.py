"""Whether what a recipe needs outside of itself is there: files, functions, models, runs, extras. Nothing is loaded or
run.

Settings whose type bears a mark `Names` are looked at, and the `needed_extras` of all. A hub id cannot be checked here;
of a function only its name in the module's text is looked for, so a module may still fail when it is imported.
"""

from __future__ import annotations

import ast
import importlib
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mrlm_cli.errors import MrlmError, RecipeError, UnknownName
from mrlm_cli.recipe import checkpoints, compose, extras, reading, shape
from mrlm_cli.recipe.problems import locate
from mrlm_cli.recipe.reading import Node
from mrlm_cli.registry import plugin_file
from mrlm_cli.strict import Names, Strict

Place = tuple[str | int, ...]  # of a setting in a recipe

_MOST_BYTES = 10_000_000  # of a module or recipe that is read


@dataclass(frozen=True, slots=True)
class Absent:
    """One thing that is not there. `later`: another command of mrlm, or pip, brings it: a recipe may need it before."""

    text: str  # file:line:column key: what is missing; hint
    later: bool


@dataclass(frozen=True, slots=True)
class Models:
    """What is known of models to bring: their names, and what to say of a missing one."""

    names: Collection[str]
    missing: Callable[[Path], str]


def absent(tree: Node, sections: Mapping[str, Any], folders: Sequence[Path], models: Models) -> list[Absent]:
    """What the sections of a recipe or fragment name and is not there, then the extras that they need and lack.

    `tree` is what they were made from, with paths made absolute; `folders` are where plugins are looked up.
    """
    found: list[Absent] = []
    named = ((path, *each) for path, settings in _settings(sections, ()) for each in _named(settings))
    for path, inner, text, names in named:
        why = None if text in names.besides else _LOOK[names.kind](text, folders, models)
        if why is not None:
            node, key = locate(tree, (*path, *inner), missing=False)
            later = _comes_later(text, names, models)
            found.append(Absent(node.mark.says(".".join(key), why), later))
    for path, extra in _extras(sections):
        if not extras.installed(extra):
            node, key = locate(tree, path, missing=False)
            why = f"needs an optional package: pip install 'mrlm[{extra}]'"
            found.append(Absent(node.mark.says(".".join(key), why), later=True))
    return found


def demand(found: Sequence[Absent]) -> None:
    """Raises RecipeError with a line for each thing that is not there."""
    if found:
        raise RecipeError("\n".join(one.text for one in found))


def is_local(path: str) -> bool:
    """Whether a path where nothing is cannot be a hub id, which has the form owner/name."""
    place = Path(path)
    beside = place.parts[:1] in (("models",), ("runs",)) or (len(place.parts) > 1 and place.parent.is_dir())
    elsewhere = place.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1
    return beside or elsewhere or place.suffix == ".gguf"


def _settings(value: Any, path: Place) -> Iterator[tuple[Place, BaseModel]]:
    """(path, settings) of every group of settings, the outer ones before those within them."""
    if isinstance(value, BaseModel):
        yield path, value
        value = {name: getattr(value, name) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _settings(inner, (*path, name))
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from _settings(inner, (*path, place))


def _named(settings: BaseModel) -> Iterator[tuple[Place, str, Names]]:
    """(path within the settings, text, mark) of every text under a mark `Names`."""
    for name, info in type(settings).model_fields.items():
        given = getattr(settings, name)
        for mark in (mark for mark in info.metadata if isinstance(mark, Names)):
            if isinstance(given, str):
                yield (name,), given, mark
            else:
                yield from (((name, place), text, mark) for place, text in enumerate(given or ()))


def _extras(sections: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
    """(path, extra) of every optional package that is needed; for what a path names, as far as names and files tell."""
    for path, settings in _settings(sections, ()):
        own = settings.needed_extras if isinstance(settings, Strict) else ()
        yield from ((path, extra) for extra in own)
        for inner, text, names in _named(settings):
            extra = _reader(Path(text).expanduser(), names.kind)
            if extra is not None and extra not in own:
                yield (*path, *inner), extra


def _reader(place: Path, kind: str) -> str | None:
    """The extra that reads what a path means; None if mrlm itself does, or nothing is known of it."""
    if kind == "file" and place.suffix == ".parquet":
        return "parquet"
    if kind == "model" and place.suffix == ".gguf":
        return "gguf"
    directory = shape.directory(place) if kind in ("model", "reward model") else None
    return "lora" if directory is not None and (directory / shape.ADAPTER_CONFIG).is_file() else None


def _comes_later(text: str, names: Names, models: Models) -> bool:
    """Whether a command of mrlm is yet to make it: a run, what is collected into runs/, a model that can be fetched."""
    place = Path(text)
    known = names.kind == "model" and place.name in models.names
    return not place.exists() and (place.parts[:1] == ("runs",) or known)


def _file(text: str, folders: Sequence[Path], models: Models) -> str | None:
    place = Path(text).expanduser()
    if place.is_file():
        return None
    if place.is_dir():
        return f"{text} is a directory; expected a file"
    beside = any((folder / text).is_file() for folder in folders)
    hint = f"; write ./{text}" if beside else ""
    if not hint and place.parts[:1] == ("runs",) and place.suffix == ".jsonl":
        hint = f"; mrlm collect … --out {text} makes it"
    return f"there is no file {text}{hint}"


def _model(text: str, folders: Sequence[Path], models: Models) -> str | None:
    place = Path(text).expanduser()
    if place.is_file():
        wanted = "a model is a directory with config.json and .safetensors, or a .gguf file"
        return None if place.suffix == ".gguf" else f"{text} is a file; {wanted}"
    if place.is_dir():
        if shape.directory(place) is not None:
            return None
        run = (place / "checkpoints").is_dir()
        return f"{text} " + ("is a run without a checkpoint yet" if run else "holds no model: it has no config.json")
    return models.missing(place) + _made_by(place) if is_local(text) or place.name in models.names else None


def _made_by(place: Path) -> str:
    """What to say of a missing run besides: the shipped recipe that makes it, or where to look."""
    if place.parent.name != "runs":
        return ""
    made = place.name in compose.shipped("recipes")
    return f"; mrlm train {place.name} makes it" if made else "; mrlm list runs names those that are there"


def _reward_model(text: str, folders: Sequence[Path], models: Models) -> str | None:
    expected = "expected a run or checkpoint of algorithm reward_model"
    place = Path(text).expanduser()
    if not place.is_dir():
        return f"there is no reward model {text}; {expected}{_made_by(place)}"
    newest = checkpoints.below(place / "checkpoints")[:1]
    for checkpoint in [place, *newest] if (place / "policy").is_dir() else newest:
        algorithm = _algorithm(checkpoint / "recipe.yaml")
        if algorithm is not None:
            return None if algorithm == "reward_model" else f"{text} is a run of {algorithm}; {expected}"
    run = (place / "checkpoints").is_dir()
    return f"{text} " + ("is a run without a checkpoint yet" if run else f"is no run; {expected}")


def _algorithm(recipe: Path) -> str | None:
    """The algorithm's type in the recipe of a checkpoint; None where there is none to read."""
    try:
        tree = reading.read(reading.decode(recipe.read_bytes()[:_MOST_BYTES], str(recipe)), str(recipe))
    except (OSError, MrlmError):
        return None
    kind = tree.plain.get("algorithm", {}).get("type") if isinstance(tree.plain, dict) else None
    return kind if isinstance(kind, str) else None


def _episodes(text: str, folders: Sequence[Path], models: Models) -> str | None:
    place = Path(text).expanduser()
    if place.is_file() or any((place / "episodes").glob("step-*.jsonl")):
        return None
    if place.is_dir():
        return f"{text} holds no stored episodes; expected a run directory with episodes/step-*.jsonl"
    return f"there is no run or file {text}"


def _command(text: str, folders: Sequence[Path], models: Models) -> str | None:
    """A word of a command: a program or argument that looks like a file must be one."""
    looks = text.startswith(("/", "./", "../", "~/")) or text.endswith(".py")
    if not looks or "=" in text or "://" in text:  # a package with a scope, an option, an address
        return None
    return None if Path(text).expanduser().exists() or shutil.which(text) else f"there is no file {text}"


def _function(text: str, folders: Sequence[Path], models: Models) -> str | None:
    place, _, name = text.rpartition(":")
    try:
        if place.endswith(".py"):
            module: Path | None = plugin_file(place, (*folders, Path.cwd()))
        else:
            module = _module(place, folders)
        if module is None:
            return None
        names = _defined(module)
    except UnknownName as error:
        return str(error)
    except SyntaxError as error:
        return f"{error.filename}:{error.lineno} is not Python: {error.msg}"
    except (OSError, ValueError) as error:
        return f"{place} cannot be read: {error}"
    if names is None or name in names:
        return None
    return f"{place} has no function {name!r}" + ("" if place.endswith(".py") else f"; it is {module}")


def _module(name: str, folders: Sequence[Path]) -> Path | None:
    """The file of a dotted module, found without importing a package; None where only an import could tell.

    Raises UnknownName if there is no such module.
    """
    first, *rest = name.split(".")
    spec = _top(first, folders) if first.isidentifier() else None
    if spec is None:
        raise UnknownName(f"there is no module {first}")
    if not rest:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    inside = places = [Path(place) for place in spec.submodule_search_locations or ()]
    for part in rest[:-1]:
        inside = [place / part for place in inside if (place / part).is_dir()]
    for place in inside:
        for candidate in (place / f"{rest[-1]}.py", place / rest[-1] / "__init__.py"):
            if candidate.is_file():
                return candidate
    if any((place / rest[-1]).is_dir() or list(place.glob(f"{rest[-1]}.*")) for place in inside):
        return None  # a compiled module, or a package without __init__
    where = places[0] if places else spec.origin
    raise UnknownName(f"there is no module {name}; {first} is {where}")


def _top(name: str, folders: Sequence[Path]) -> ModuleSpec | None:
    """What an import of a top-level name would find, as Python looks for it: the folders and the working directory lead
    its path, and a folder without __init__ counts only where no module or package has the name."""
    importlib.invalidate_caches()  # files may have come since somebody looked
    path = [*map(str, folders), str(Path.cwd()), *sys.path]
    for finder in sys.meta_path:
        found = finder.find_spec(name, path if finder is PathFinder else None)
        if found is not None:
            return found
    return None


def _defined(module: Path) -> set[str] | None:
    """The names that a module's text defines at its top level; None if it imports `*` or makes them when asked."""
    with module.open("rb") as file:
        tree = ast.parse(file.read(_MOST_BYTES), str(module))
    names: set[str] = set()
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name == "__getattr__":
                return None
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        else:
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            waiting.extend(ast.iter_child_nodes(node))
    return None if "*" in names else names


_LOOK: dict[str, Callable[[str, Sequence[Path], Models], str | None]] = {
    "file": _file,
    "function": _function,
    "model": _model,
    "reward model": _reward_model,
    "episodes": _episodes,
    "command": _command,
}

"""Files and overrides → one recipe.

Order: schema defaults < includes in their order < the recipe's body < `--overlay FILE` < `key.path=value`. Maps merge,
lists are replaced whole. A fragment is a file with neither `algorithm` nor `environments` nor `data`; it says where and
on what to train, is checked for the sections that it has, and cannot be trained.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

import mrlm_cli
from mrlm_cli import registry
from mrlm_cli.errors import RecipeError, UnknownName, UserError
from mrlm_cli.recipe import explain, validate
from mrlm_cli.recipe.problems import suggestion
from mrlm_cli.recipe.reading import LONGEST, Mark, Node, decode, plain_scalar, read
from mrlm_cli.recipe.schema import Recipe
from mrlm_cli.strict import EnvironmentSettings


@dataclass(frozen=True, slots=True)
class Composed:
    """A recipe and where each of its values came from."""

    recipe: Recipe
    origins: dict[str, str]  # key path -> "default", "file:line" or "override"
    path: Path  # the recipe's file, absolute
    folders: tuple[Path, ...]  # where ./plugin.py files are looked up: the recipe's folder, the working directory
    tree: Node = field(repr=False)  # what was read, with the place of every value

    @property
    def sections(self) -> dict[str, Any]:
        """Every section by its name."""
        return {name: getattr(self.recipe, name) for name in Recipe.model_fields}


@dataclass(frozen=True, slots=True)
class Checked:
    """What a valid file holds. `sections` are those that a fragment sets; a recipe has them all."""

    fragment: bool
    sections: dict[str, Any]
    folders: tuple[Path, ...]  # as in Composed
    tree: Node = field(repr=False)


def load(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    overlay: str | Path | None = None,
    *,
    folders: Sequence[Path] = (),
) -> Composed:
    """A whole recipe by path or shipped name.

    `folders` are searched for plugins and relative paths before the recipe's own folder. Raises RecipeError with every
    problem, for a fragment too; UnknownName if there is no such file.
    """
    path = find(recipe)
    tree = _compose(path, overrides, overlay)
    if _is_fragment(tree):
        folder = path.parent.name
        raise RecipeError(
            f"{_shown(path)} is a fragment (no algorithm, no environments) and cannot be trained; "
            f"put `include: [{folder}/{path.stem}]` into a recipe, or add --overlay {_shown(path)} to its command"
        )
    return _finish(tree, path, folders)


def check(recipe: str | Path, overrides: Sequence[str] = (), overlay: str | Path | None = None) -> Checked:
    """Validate a recipe or a fragment. Raises RecipeError with every problem."""
    path = find(recipe)
    tree = _compose(path, overrides, overlay)
    if _is_fragment(tree):
        folders = _folders(path, ())
        tree = validate.absolute(tree, folders)
        return Checked(True, validate.fragment(tree, folders), folders, tree)
    composed = _finish(tree, path, ())
    return Checked(False, composed.sections, composed.folders, composed.tree)


def environment(name: str, settings: Sequence[str]) -> tuple[EnvironmentSettings, tuple[Path, ...]]:
    """One environment by name with its settings as key=value, and where its file is looked up. Raises UserError."""
    folders = (Path.cwd(),)
    registry.resolve("environments", name, folders)  # a name alone: there is no file whose line could be named
    tree = read(as_yaml({"environments": [{"type": name}]}), name)
    for one in settings:
        tree = _override(tree, f"environments.0.{one}")
    found: EnvironmentSettings = validate.fragment(validate.absolute(tree, folders), folders)["environments"][0]
    return found, folders


def of(fields: Mapping[str, Any], label: str, overrides: Sequence[str]) -> Composed:
    """A recipe of plain fields, told as `label` where something is wrong. Raises RecipeError."""
    tree = read(as_yaml(dict(fields)), label)
    for override in overrides:
        tree = _override(tree, override)
    return _finish(tree, Path.cwd() / label, ())


def dump(recipe: Recipe) -> str:
    """YAML with every value explicit; it loads back to an equal recipe."""
    return yaml.dump(recipe.model_dump(), Dumper=_Dumper, sort_keys=False, width=120)


def as_yaml(value: Any) -> str:
    """One value as it may be written on one line of a recipe."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=2**31)
    return text.removesuffix("\n").removesuffix("\n...")


def shipped(kind: str) -> dict[str, Path]:
    """Files that come with the package, by name without suffix; `kind` is recipes or configs."""
    package = Path(mrlm_cli.__file__).resolve().parent
    for root in (package / "_shipped" / kind, package.parent / kind):
        if root.is_dir():
            return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}
    return {}


def find(recipe: str | Path) -> Path:
    """The absolute path of a recipe given by path or by the bare name of a shipped one. Raises UnknownName."""
    text = str(recipe)
    path = Path(text)
    try:
        if path.is_file():
            return Path(os.path.abspath(path))
        names = shipped("recipes")
        if text in names:
            return names[text]
        if path.is_dir():
            of_run = path / "recipe.yaml"
            hint = f", such as {of_run}; the run itself goes on with: mrlm resume {text}" if of_run.is_file() else ""
            raise UnknownName(f"{text} is a directory; expected a recipe's file{hint}")
        beside = [str(other) for other in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    except (OSError, ValueError) as error:  # too long, or with a zero byte
        raise UnknownName(f"{text[:80]!r} cannot be a file: {error}") from error
    close = difflib.get_close_matches(text, [*names, *beside], n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else f"shipped recipes: {', '.join(names) or 'none'}"
    raise UnknownName(f"there is no recipe {text}; {hint}")


def values(recipe: Recipe) -> dict[str, Any]:
    """Every value of the recipe by key path; lists of plain values stay whole."""
    return {".".join(path): value for path, value in _leaves(recipe.model_dump(mode="json"), ())}


def different(there: Recipe, asked: Recipe, settled: Recipe) -> str:
    """What a run's recipe says otherwise than another one, in brackets, at most three settings; empty where nothing.

    `settled` is `asked` with what depends on machine and data filled in, as a run's recipe has it. A setting may be as
    in either: one that was not there yet when the run began has its default, which may be null, to be filled in.
    """
    old, left, new = values(there), values(asked), values(settled)
    keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) not in (left.get(key), new.get(key))]
    told = [f"{key}: {as_yaml(old.get(key))} there, {as_yaml(new.get(key))} here" for key in keys]
    return f" ({'; '.join([*told[:3], *(['…'] if told[3:] else [])])})" if told else ""


def _finish(tree: Node, path: Path, more: Sequence[Path]) -> Composed:
    folders = _folders(path, more)
    tree = validate.absolute(tree, folders)
    recipe = validate.recipe(tree, folders)
    origins = {".".join(key): _origin(tree, key) for key, _ in _leaves(recipe.model_dump(mode="json"), ())}
    return Composed(recipe, origins, path, folders, tree)


def _folders(path: Path, more: Sequence[Path]) -> tuple[Path, ...]:
    return tuple(dict.fromkeys([*more, path.parent, Path.cwd()]))


def _compose(path: Path, overrides: Sequence[str], overlay: str | Path | None) -> Node:
    body = _file(path)
    layers = [_fragment(_included(name, mark, path.parent), mark) for name, mark in _include_names(body)]
    tree = Node({}, body.mark)
    for layer in [*layers, _without_include(body)]:
        tree = _merge(tree, layer)
    if overlay is not None:
        over = Path(overlay)
        if not over.is_file():
            raise UnknownName(f"there is no overlay {overlay}")
        layer = _file(over)
        if "include" in validate.mapping(layer):
            mark = validate.mapping(layer)["include"].name_mark
            raise RecipeError(mark.says("include", "an overlay includes nothing"))
        tree = _merge(tree, layer)
    problems = []
    for override in overrides:
        try:
            tree = _override(tree, override)
        except RecipeError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError("\n".join(problems))
    return tree


def _file(path: Path) -> Node:
    shown = _shown(path)
    try:
        with path.open("rb") as file:
            data = file.read(4 * LONGEST + 1)
    except OSError as error:
        raise UserError(f"{shown} cannot be read: {error.strerror}") from error
    node = read(decode(data, shown), shown)
    if not isinstance(node.value, dict):
        raise RecipeError(node.mark.says("", "expected a mapping of keys to values"))
    return replace(node, mark=Mark(shown, 1, 1))


def _shown(path: Path) -> str:
    """The path as a person would type it here."""
    full, here = os.path.abspath(path), os.getcwd()
    return os.path.relpath(full, here) if full.startswith(here + os.sep) else full


def _is_fragment(tree: Node) -> bool:
    return not any(name in validate.mapping(tree) for name in validate.SCIENCE)


def _include_names(body: Node) -> Iterator[tuple[str, Mark]]:
    node = validate.mapping(body).get("include")
    if node is None:
        return
    items = node.value if isinstance(node.value, list) else [node]
    for item in items:
        if not isinstance(item.value, str) or not item.value:
            raise RecipeError(item.mark.says("include", "expected the name of a fragment, or a list of names"))
        yield item.value, item.mark


def _included(name: str, mark: Mark, folder: Path) -> Path:
    file = name if name.endswith((".yaml", ".yml")) else f"{name}.yaml"
    known = shipped("configs")
    try:
        for candidate in (folder / file, Path("configs") / file):
            if candidate.is_file():
                return candidate
    except (OSError, ValueError) as error:
        raise RecipeError(mark.says("include", f"{name[:80]!r} cannot be a file: {error}")) from error
    if name.removesuffix(".yaml") in known:
        return known[name.removesuffix(".yaml")]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"shipped: {', '.join(known) or 'none'}"
    raise RecipeError(mark.says("include", f"there is no fragment {name}; {hint}"))


def _fragment(path: Path, mark: Mark) -> Node:
    node = _file(path)
    if "include" in validate.mapping(node):
        inner = validate.mapping(node)["include"].name_mark
        raise RecipeError(inner.says("include", "a fragment includes nothing; list all fragments in the recipe"))
    if not _is_fragment(node):
        raise RecipeError(mark.says("include", f"{_shown(path)} is a whole recipe; only fragments can be included"))
    return node


def _without_include(node: Node) -> Node:
    return replace(node, value={name: item for name, item in validate.mapping(node).items() if name != "include"})


def _merge(base: Node, over: Node) -> Node:
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    merged = dict(base.value)
    for name, item in over.value.items():
        merged[name] = _merge(merged[name], item) if name in merged else item
    return replace(over, value=merged)


def _override(tree: Node, override: str) -> Node:
    key, equals, text = override.partition("=")
    mark = Mark(override)
    if not equals:
        hint = f"; a second file is given as --overlay {override}" if override.endswith((".yaml", ".yml")) else ""
        raise RecipeError(mark.says("", f"expected key.path=value, such as optimizer.lr=1e-4{hint}"))
    parts = key.split(".")
    if not all(parts):
        raise RecipeError(mark.says("", "expected key.path=value; a part of the key is empty"))
    if parts[0] == "include":
        raise RecipeError(mark.says("", "include cannot be overridden; use --overlay FILE"))
    if len(parts) > 32:
        raise RecipeError(mark.says("", "the key is nested deeper than 32 levels"))
    value = read(text, override, override=True)
    return _set(tree, parts, replace(value, key=mark), mark)


def _set(node: Node, parts: Sequence[str], value: Node, mark: Mark) -> Node:
    if not parts:
        return _merge(node, value)
    part, rest = parts[0], parts[1:]
    if isinstance(node.value, list):
        if not part.isdecimal() or int(part) >= len(node.value):
            raise RecipeError(mark.says("", f"expected an index from 0 to {len(node.value) - 1} instead of {part!r}"))
        items = list(node.value)
        items[int(part)] = _set(items[int(part)], rest, value, mark)
        return replace(node, value=items)
    if isinstance(node.value, dict):
        inner = node.value.get(part, Node({}, mark, mark) if rest else value)
        return replace(node, value={**node.value, part: _set(inner, rest, value, mark)})
    if node.value is None:
        return _set(replace(node, value={}), parts, value, mark)
    hint = suggestion(".".join(parts), [], explain.paths())
    raise RecipeError(mark.says("", f"there is nothing below this key{hint}"))


def _origin(tree: Node, path: Sequence[str]) -> str:
    node = tree
    for part in path:
        if isinstance(node.value, dict) and part in node.value:
            node = node.value[part]
        elif isinstance(node.value, list) and part.isdecimal() and int(part) < len(node.value):
            node = node.value[int(part)]
        else:
            return "default"
    return node.mark.origin


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict) and value:
        items: Sequence[tuple[Any, Any]] = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = list(enumerate(value))
    else:
        yield path, value
        return
    for name, item in items:
        yield from _leaves(item, (*path, str(name)))


class _Dumper(yaml.SafeDumper):
    """Quotes every text that the core schema would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if isinstance(plain_scalar(text), str) and "\n" not in text else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)

"""A merged tree → the sections of a recipe, each validated by its own class, every problem at its own place."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mrlm_cli import registry
from mrlm_cli.errors import UserError
from mrlm_cli.recipe import explain, roles
from mrlm_cli.recipe.agents import AGENTS
from mrlm_cli.recipe.problems import LIST_KINDS, Problems, locate, near, sentence, shown, suggestion
from mrlm_cli.recipe.reading import Mark, Node
from mrlm_cli.recipe.schema import LISTS, MODELS, PLUGINS, Head, Recipe
from mrlm_cli.recipe.sections import Hardware, Sampling, Value
from mrlm_cli.strict import EngineSettings, EnvironmentSettings, Strict

VARIANTS: dict[str, Mapping[str, type[Strict]]] = {
    "model": MODELS,
    "agents": AGENTS,
}  # whose `type` is of a fixed table
_FILES = (".gguf", ".jsonl", ".json", ".parquet")  # a bare word that ends so is a file
SCIENCE = ("algorithm", "environments", "data")  # a file with none of these is a fragment


def recipe(tree: Node, folders: Sequence[Path]) -> Recipe:
    """The whole recipe. Raises RecipeError with every problem."""
    problems = Problems()
    parts = _parts(tree, folders, problems)
    for name, info in Recipe.model_fields.items():
        if name not in mapping(tree) and name not in Head.model_fields and name not in parts and info.is_required():
            problems.add(tree.mark, name, "required, and missing")
    if not {"environments", "data"} & mapping(tree).keys():
        sources = getattr(parts.get("algorithm"), "sources", ("rollouts",))
        problems.add(tree.mark, "environments" if "rollouts" in sources else "data", "required, and missing")
    head = _head(tree, problems, whole=True)
    _check_steps(tree, problems)
    problems.raise_if_any()
    _check_value(tree, parts, folders, problems)
    _check_turns(tree, parts, folders, problems)
    _check_graphs(tree, parts, problems)
    problems.raise_if_any()
    if {"agents", "environments"} <= parts.keys():
        rewards = [reward.label for reward in parts.get("rewards", ())]
        roles.check(mapping(tree)["agents"], parts["agents"], parts["environments"], rewards, folders, problems)
        problems.raise_if_any()
    try:
        return Recipe(**head, **parts)
    except ValidationError as error:
        for one in error.errors(include_url=False):
            found = one.get("ctx", {}).get("found", [(one["loc"], sentence(one))])
            for location, text in found:
                node, _ = locate(tree, location, missing=False)
                problems.add(node.mark, ".".join(map(str, location)), text)
        problems.raise_if_any()
        raise


def _check_value(tree: Node, parts: Mapping[str, Any], folders: Sequence[Path], problems: Problems) -> None:
    """Settings of a value function are for algorithms that have one."""
    algorithm = parts["algorithm"]
    if parts["model"].value == Value():
        return
    if not registry.resolve("algorithms", algorithm.type, folders)(algorithm).needs.values:
        node = mapping(mapping(tree)["model"])["value"]
        problems.add(node.mark, "model.value", f"algorithm {algorithm.type} has no value function; leave it out")


def _check_turns(tree: Node, parts: Mapping[str, Any], folders: Sequence[Path], problems: Problems) -> None:
    """What an environment asks of its agents is not cut short by sampling.max_turns, which does not bind rewards."""
    most = parts.get("sampling", Sampling()).max_turns
    rewards = {role for role, agent in parts.get("agents", {}).items() if agent.type == "scorer"}
    for index, settings in enumerate(parts.get("environments", ())):
        kind = registry.resolve("environments", settings.type, folders)
        asked = [kind.replies(settings, role) for role in kind.roles(settings) if role not in rewards]
        for name, replies in sorted({limit for limit in asked if limit is not None}):
            if replies > most:
                item = _listed(tree, "environments")[index]
                given = getattr(settings, name)
                text = f"got {given}, which takes {replies} replies; sampling.max_turns = {most} cuts them short"
                problems.add(mapping(item).get(name, item).mark, f"environments.{index}.{name}", text)


def _check_graphs(tree: Node, parts: Mapping[str, Any], problems: Problems) -> None:
    """CUDA graphs are of CUDA. Where the device is `auto`, loading the engine finds out."""
    if getattr(parts.get("engine"), "cuda_graphs", False) and parts.get("hardware", Hardware()).device == "cpu":
        node = mapping(mapping(tree)["engine"])["cuda_graphs"]
        problems.add(node.mark, "engine.cuda_graphs", "got true; expected false where hardware.device is cpu")


def _check_steps(tree: Node, problems: Problems) -> None:
    """The number of steps is needed, and above 0, unless data.epochs stands for it."""
    epochs = mapping(mapping(tree)["data"]).get("epochs") if "data" in mapping(tree) else None
    steps = mapping(tree).get("steps")
    if steps is None and epochs is None:
        problems.add(tree.mark, "steps", "required, and missing")
    elif steps is not None and steps.plain == 0 and epochs is None:
        problems.add(steps.mark, "steps", "got 0; expected a number of at least 1")


def fragment(tree: Node, folders: Sequence[Path]) -> dict[str, Any]:
    """The sections that are there, by name. Raises RecipeError with every problem."""
    problems = Problems()
    parts = _parts(tree, folders, problems)
    head = _head(tree, problems, whole=False)
    problems.raise_if_any()
    return {**{name: head[name] for name in head if name in mapping(tree)}, **parts}


def mapping(node: Node) -> dict[str, Node]:
    """The node's keys; none if it is no mapping."""
    return node.value if isinstance(node.value, dict) else {}


def absolute(tree: Node, folders: Sequence[Path]) -> Node:
    """The tree with every relative path that exists in one of `folders` made absolute; the others as written.

    Paths are `model.path`, `model.value.path`, `data.path`, `data.validation_path`, `data.test_path`, those of agents,
    the files in `./file.py:Class`, text settings of environments and rewards called `path` or ending in `_path`, their
    lists called `functions`, and commands of tool servers.
    """
    for path in list(_paths(tree)):
        tree = _replaced(tree, path, folders)
    return tree


def _paths(tree: Node) -> Iterator[tuple[str | int, ...]]:
    yield ("model", "path")
    yield ("model", "value", "path")
    for name in ("type", "path", "validation_path", "test_path"):
        yield ("data", name)
    yield ("algorithm", "type")
    yield ("engine", "type")
    agents = mapping(tree).get("agents")
    if agents is not None:
        for role in mapping(agents):
            yield from (("agents", role, "path"), ("agents", role, "player"))
    for section in LISTS:
        listed = mapping(tree).get(section)
        if listed is not None and isinstance(listed.value, list):
            for index, item in enumerate(listed.value):
                for name in mapping(item):
                    if name in ("type", "path") or name.endswith("_path"):
                        yield (section, index, name)
                yield from ((section, index, *path) for path in _functions(item))


def _functions(item: Node) -> Iterator[tuple[str | int, ...]]:
    """Paths of functions, and of the words of commands, inside an item of a list."""
    yield from (("functions", place) for place in range(len(_listed(item, "functions"))))
    for number, server in enumerate(_listed(item, "mcp")):
        yield from (("mcp", number, "command", place) for place in range(len(_listed(server, "command"))))


def _listed(node: Node, name: str) -> list[Node]:
    found = mapping(node).get(name)
    return found.value if found is not None and isinstance(found.value, list) else []


def _replaced(node: Node, path: Sequence[str | int], folders: Sequence[Path]) -> Node:
    if not path:
        return replace(node, value=_found(node.value, folders)) if isinstance(node.value, str) else node
    first, rest = path[0], path[1:]
    if isinstance(node.value, dict) and first in node.value:
        name = str(first)
        return replace(node, value={**node.value, name: _replaced(node.value[name], rest, folders)})
    if isinstance(node.value, list) and isinstance(first, int):
        items = list(node.value)
        items[first] = _replaced(items[first], rest, folders)
        return replace(node, value=items)
    return node


def _found(text: str, folders: Sequence[Path]) -> str:
    file, colon, name = text.rpartition(":")
    place = file if colon and file.endswith(".py") else text
    if not place or "\0" in place or (place == text and "/" not in place and not place.endswith(_FILES)):
        return text  # a registered name; a bare word beside a folder of the same name stays a hub id
    for folder in folders:
        try:
            candidate = folder / Path(place).expanduser()
            if candidate.exists():
                return f"{candidate.resolve()}{colon}{name}" if place != text else str(candidate.resolve())
        except (OSError, RuntimeError):  # too long for the file system, or of an unknown user: no path
            return text
    return text


def _head(tree: Node, problems: Problems, *, whole: bool) -> dict[str, Any]:
    given = {name: node.plain for name, node in mapping(tree).items() if name in Head.model_fields}
    try:
        return Head.model_validate(given).model_dump()
    except ValidationError as error:
        for one in error.errors(include_url=False):
            if one["type"] == "missing":
                if whole:
                    problems.add(tree.mark, str(one["loc"][0]), "required, and missing")
                continue
            node, path = locate(tree, one["loc"], missing=False)
            problems.add(node.mark, ".".join(path), sentence(one))
        return given


def _parts(tree: Node, folders: Sequence[Path], problems: Problems) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for name, node in mapping(tree).items():
        if name in Head.model_fields:
            continue
        if name not in Recipe.model_fields:
            hint = suggestion(name, list(Recipe.model_fields), explain.paths())
            problems.add(node.name_mark, name, f"unknown key{hint}")
        elif name in LISTS:
            parts[name] = _list(name, node, folders, problems)
        elif name == "agents":
            parts[name] = _agents(node, folders, problems)
        else:
            found = _section(name, node, [name], folders, problems)
            if found is not None:
                parts[name] = found
    return parts


def _list(name: str, node: Node, folders: Sequence[Path], problems: Problems) -> tuple[Any, ...]:
    if not isinstance(node.value, list) or (name == "environments" and not node.value):
        wanted = "at least one environment" if name == "environments" else name
        problems.add(node.mark, name, f"got {shown(node.plain)}; expected a list of {wanted}")
        return ()
    found = [_section(name, item, [name, str(index)], folders, problems) for index, item in enumerate(node.value)]
    return tuple(item for item in found if item is not None)


def _agents(node: Node, folders: Sequence[Path], problems: Problems) -> dict[str, Any]:
    if not isinstance(node.value, dict):
        problems.add(node.mark, "agents", f"got {shown(node.plain)}; expected a mapping of roles to agents")
        return {}
    found = {role: _section("agents", item, ["agents", role], folders, problems) for role, item in node.value.items()}
    return {role: item for role, item in found.items() if item is not None}


def _section(kind: str, node: Node, path: list[str], folders: Sequence[Path], problems: Problems) -> Any:
    """The section's instance, or None after telling `problems` why not."""
    where = ".".join(path)
    if not isinstance(node.value, dict):
        problems.add(node.mark, where, f"got {shown(node.plain)}; expected a mapping of keys to values")
        return None
    owner: Any = None
    settings: type[Strict] | None
    if kind in PLUGINS:
        owner = _owner(kind, node, where, folders, problems)
        settings = owner and owner.Config
    elif kind in VARIANTS:
        settings = _variant(VARIANTS[kind], node, where, problems)
    else:
        annotation: Any = Recipe.model_fields[kind].annotation
        settings = annotation
    if settings is None:
        return None
    try:
        section = settings.model_validate(node.plain)
    except ValidationError as error:
        for one in error.errors(include_url=False):
            _report(one, settings, node, path, problems)
        return None
    if isinstance(section, EnvironmentSettings):
        _rewards(section, owner, node, where, problems)
    return section


def _report(one: Any, settings: type[Strict], node: Node, path: list[str], problems: Problems) -> None:
    missing = one["type"] == "missing"
    inner, rest = locate(node, one["loc"], missing)
    where = ".".join([*path, *rest])
    if one["type"] == "extra_forbidden":
        kind = mapping(node).get("type")
        siblings = explain.siblings(settings, rest[:-1])
        hint = suggestion(where, siblings, explain.paths((".".join(path), settings)))
        variant = f" for type {kind.plain}" if kind is not None and len(rest) == 1 else ""
        problems.add(inner.name_mark, where, f"unknown key{variant}{hint}")
    elif one["type"] in LIST_KINDS:
        problems.add(inner.mark, where, sentence(one, explain.a_list(settings, rest)))
    else:
        problems.add(inner.name_mark if missing else inner.mark, where, sentence(one))


def _type(node: Node, where: str, default: str | None, problems: Problems) -> tuple[str, Mark] | None:
    given = mapping(node).get("type")
    if given is None:
        if default is None:
            problems.add(node.name_mark, f"{where}.type", "required, and missing")
            return None
        return default, node.mark
    if not isinstance(given.value, str):
        problems.add(given.mark, f"{where}.type", f"got {shown(given.plain)}; expected a name")
        return None
    return given.value, given.mark


def _variant(table: Mapping[str, type[Strict]], node: Node, where: str, problems: Problems) -> type[Strict] | None:
    """The settings class that the section's `type` names among those of the table."""
    named = _type(node, where, None, problems)
    if named is None:
        return None
    name, mark = named
    if name not in table:
        hint = near(name, table)
        problems.add(mark, f"{where}.type", f"got {shown(name)}; expected one of {', '.join(table)}{hint}")
    return table.get(name)


def _owner(kind: str, node: Node, where: str, folders: Sequence[Path], problems: Problems) -> Any:
    """The class that the section's `type` names."""
    group, base = PLUGINS[kind]
    named = _type(node, where, EngineSettings().type if kind == "engine" else None, problems)
    if named is None:
        return None
    name, mark = named
    if ":" in name and not name.rpartition(":")[0].endswith(".py"):
        for folder in reversed([str(folder) for folder in folders]):
            if folder not in sys.path:
                sys.path.insert(0, folder)  # `package.module:Class` may lie beside the recipe
    try:
        owner = registry.resolve(group, name, folders)
    except UserError as error:
        problems.add(mark, f"{where}.type", str(error))
        return None
    config = getattr(owner, "Config", None)
    if not (isinstance(config, type) and issubclass(config, base)):
        problems.add(mark, f"{where}.type", f"{name} has no Config derived from {base.__name__}")
        return None
    return owner


def _rewards(section: EnvironmentSettings, owner: Any, node: Node, where: str, problems: Problems) -> None:
    rewards, declared = mapping(node).get("rewards"), owner.declared(section)
    for component in section.rewards:
        if component not in declared and rewards is not None:
            mark = mapping(rewards)[component].name_mark
            hint = near(component, declared) or f"; it declares {', '.join(declared) or 'none'}"
            text = f"{section.label} declares no such reward component{hint}"
            problems.add(mark, f"{where}.rewards.{component}", text)

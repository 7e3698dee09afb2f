"""What every setting means: its sentence, type, default and range, read from the classes themselves."""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from mrlm_cli import registry
from mrlm_cli.recipe import json_schema
from mrlm_cli.recipe.agents import AGENTS
from mrlm_cli.recipe.schema import LISTS, MODELS, PLUGINS, Recipe
from mrlm_cli.strict import Strict


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of a recipe. `variant` is the `type` of the section that has it, where not every type has."""

    path: str
    variant: str | None
    sentence: str
    type: str
    default: str


def fields(settings: type[Strict], prefix: str = "") -> Iterator[tuple[str, type[Strict], str, FieldInfo]]:
    """(path, class, name, field) of every key under a class, sections before their keys."""
    for name, info in settings.model_fields.items():
        path = f"{prefix}.{name}" if prefix else name
        yield path, settings, name, info
        for inner in _classes(info):
            yield from fields(inner, path)


def siblings(settings: type[Strict], path: list[str]) -> list[str]:
    """The keys allowed in the section that `path` (below `settings`) names; list indices are passed over."""
    level: list[type[Strict]] = [settings]
    for part in path:
        if not part.isdigit():
            level = [
                inner for owner in level if part in owner.model_fields for inner in _classes(owner.model_fields[part])
            ]
    return list(dict.fromkeys(name for owner in level for name in owner.model_fields))


def a_list(settings: type[Strict], path: list[str]) -> str:
    """What a list holds that is expected at `path` below `settings`, and its default as an example where it has one.

    Such as `a list of 2: number above 0, at most 1; number above 0, at most 100, such as [0.2, 0.2]`.
    """
    where = ".".join(part for part in path if not part.isdigit())
    for at, owner, name, info in fields(settings):
        if at == where:
            said = f"a {json_schema.words(owner, name)}"
            example = to_jsonable_python(info.default) if isinstance(info.default, tuple) else None
            return f"{said}, such as {json.dumps(example)}" if example else said
    return "a list"  # below a mapping whose keys may be any


def paths(own: tuple[str, type[Strict]] | None = None) -> list[str]:
    """The path of every setting: a recipe's own, the built-in kinds', and those of one more class under a prefix."""
    found = [path for path, *_ in _recipe_fields()]
    for section in PLUGINS:
        prefix = f"{section}.0" if section in LISTS else section
        found += [path for _, owner in _built_in(section) for path, *_ in fields(owner.Config, prefix)]
    if own is not None:
        found += [path for path, *_ in fields(own[1], own[0])]
    return list(dict.fromkeys(found))


def settings() -> list[Setting]:
    """Every setting of a recipe, those of all built-in kinds included."""
    return list(_settings())


@cache
def _settings() -> tuple[Setting, ...]:
    found = [_setting(path, None, owner, name, info) for path, owner, name, info in _recipe_fields()]
    tables: dict[str, dict[str, Any]] = {"model": {**MODELS}, "agents": {**AGENTS}}
    for section, table in tables.items():
        for variant, model in table.items():
            found += [_setting(path, variant, owner, name, info) for path, owner, name, info in fields(model, section)]
    for section in PLUGINS:
        for variant, owner in _built_in(section):
            found += [
                _setting(path, variant, holder, name, info)
                for path, holder, name, info in fields(owner.Config, section)
            ]
    return tuple(found)


def _recipe_fields() -> Iterator[tuple[str, type[Strict], str, FieldInfo]]:
    for path, owner, name, info in fields(Recipe):
        if path.partition(".")[0] not in ("model", "agents", *PLUGINS) or "." not in path:
            yield path, owner, name, info


def _built_in(section: str) -> list[tuple[str, Any]]:
    kind, _ = PLUGINS[section]
    return [(name, registry.resolve(kind, name)) for name in registry.BUILT_IN[kind]]


def _setting(path: str, variant: str | None, owner: type[Strict], name: str, info: FieldInfo) -> Setting:
    if info.is_required():
        default = "required"
    else:
        value = info.get_default(call_default_factory=True)
        plain = value.model_dump(mode="json") if isinstance(value, Strict) else value
        default = json.dumps(plain, ensure_ascii=False)
    words = "settings of the section" if _classes(info) else json_schema.words(owner, name)
    return Setting(path, variant, inspect.cleandoc(info.description or "").replace("\n", " "), words, default)


def _classes(info: FieldInfo) -> list[type[Strict]]:
    """The settings classes that a field's annotation holds."""
    return list(_inside(info.annotation))


def _inside(annotation: Any) -> Iterator[type[Strict]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, Strict):
            yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from _inside(argument)

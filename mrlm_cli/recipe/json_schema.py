"""JSON Schema of a recipe with all registered kinds, and of one setting in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic.json_schema import models_json_schema

from mrlm_cli import registry
from mrlm_cli.recipe.schema import LISTS, PLUGINS, Recipe
from mrlm_cli.strict import Strict

_BOUNDS = {
    "minimum": "of at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
}
_TYPES = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a whole recipe; the union of everything registered for each typed section."""
    owners = {
        (section, name): registry.resolve(kind, name)
        for section, (kind, _) in PLUGINS.items()
        for name in registry.names(kind)
    }
    references, definitions = models_json_schema(
        [(Recipe, "validation"), *((owner.Config, "validation") for owner in owners.values())],
        ref_template="#/$defs/{model}",
    )
    schemas: dict[str, Any] = definitions["$defs"]
    schema = dict(schemas.pop(references[Recipe, "validation"]["$ref"].rpartition("/")[2]))
    properties = dict(schema["properties"])
    for section in PLUGINS:
        branches: list[dict[str, Any]] = [_plugin()]
        for (owned, name), owner in owners.items():
            if owned == section:
                reference = references[owner.Config, "validation"]["$ref"]
                own = schemas[reference.rpartition("/")[2]]
                branches.append({**own, "properties": {**own["properties"], "type": {"const": name}}})
        union: dict[str, Any] = {"anyOf": branches}
        description = properties[section].get("description", "")
        if section in LISTS:
            least = 1 if section == "environments" else 0
            properties[section] = {"type": "array", "minItems": least, "items": union, "description": description}
        else:
            properties[section] = {**union, "description": description}
    properties["include"] = {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        "description": "Fragments to merge below this file, searched beside it, in ./configs, among the shipped ones.",
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "mrlm recipe",
        "properties": properties,
        "$defs": schemas,
    }


def words(settings: type[Strict], name: str) -> str:
    """A setting's type and range in words, e.g. `number above 0, at most 1, or null`."""
    schema = settings.model_json_schema()
    return _words(schema["properties"][name], schema.get("$defs", {}))


def _plugin() -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"type": {"type": "string", "pattern": ":", "description": "./file.py:Class or module:Class"}},
        "required": ["type"],
    }


def _words(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        return _words(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in schema or "oneOf" in schema:
        branches = [_words(branch, definitions) for branch in schema.get("anyOf") or schema["oneOf"]]
        return ", or ".join(dict.fromkeys(branches))
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    kind = schema.get("type", "")
    if kind == "array":
        items = schema.get("prefixItems")
        if items:
            return f"list of {len(items)}: {'; '.join(_words(item, definitions) for item in items)}"
        return f"list of {_words(schema.get('items', {}), definitions)}"
    if kind == "object":
        if "properties" in schema:
            return f"settings {', '.join(schema['properties'])}"
        values = schema.get("additionalProperties", {})  # True where anything may stand
        return f"mapping of names to {_words({} if values is True else values, definitions)}"
    bounds = [text.format(schema[bound]) for bound, text in _BOUNDS.items() if bound in schema]
    return f"{_TYPES.get(kind, 'any value')} {', '.join(bounds)}".rstrip()

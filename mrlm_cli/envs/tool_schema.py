"""A tool is a typed Python function; what a model is told about it comes from its signature."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol, get_args, get_origin, get_type_hints

MOST_ANSWER = 2000  # characters of a tool's answer
MOST_SAID = 300  # characters of what a broken tool says
_NAMES: dict[Any, str] = {str: "string", int: "integer", float: "number", bool: "boolean"}


class ToolError(Exception):
    """A call that cannot be answered; the text goes to the policy and says what to do instead."""


class BrokenTool(ToolError):
    """A tool that is not built in raised something, or ended its process; the policy is told, and the call is counted
    apart."""


class LateTool(ToolError):
    """A tool did not answer in time; the policy is told, and the call is counted apart."""


class Offered(Protocol):
    """What a policy may call."""

    @property
    def name(self) -> str:
        """Its name, the only one so in a session."""

    @property
    def schema(self) -> Mapping[str, Any]:
        """{"type": "function", "function": {"name", "description", "parameters"}}, as chat templates take it."""

    @property
    def deadline(self) -> float:
        """Seconds for one call; infinity for a tool that is known to answer at once."""

    def call(self, arguments: Any, seconds: float) -> str:
        """The answer, of at most MOST_ANSWER characters and perhaps one more, within so many seconds.

        Raises LateTool after them, ToolError for what else the policy shall be told, and SessionFailure for what is not
        its doing: a policy that brings about a failure would leave its episodes out of the training.
        """


@dataclass(frozen=True, slots=True)
class Tool:
    """A function with its schema, in the form that chat templates take."""

    deadline: ClassVar[float] = math.inf
    name: str
    schema: Mapping[str, Any]  # {"type": "function", "function": {"name", "description", "parameters"}}
    function: Callable[..., Any]

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Tool:
        """The tool of a function that returns text; what else it returns is written as JSON.

        The first paragraph of its docstring is the description; a parameter is str, int, float, bool, a Literal of
        texts or a list of one of these, and `Annotated[int, "what it is"]` describes it. Raises TypeError for a
        parameter without such a type, or a function without a docstring.
        """
        described = inspect.getdoc(function)
        if not described:
            raise TypeError(f"tool {function.__name__} has no docstring to describe it by")
        hints = get_type_hints(function, include_extras=True)
        properties, required = {}, []
        for name, parameter in inspect.signature(function).parameters.items():
            if name not in hints or parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
                raise TypeError(f"tool {function.__name__}: parameter {name} needs a type and a name of its own")
            properties[name] = _schema(hints[name], f"tool {function.__name__}: parameter {name}")
            if parameter.default is parameter.empty:
                required.append(name)
        parameters = {"type": "object", "properties": properties, "required": required}
        body = {
            "name": function.__name__,
            "description": " ".join(described.split("\n\n")[0].split()),
            "parameters": parameters,
        }
        return cls(function.__name__, {"type": "function", "function": body}, function)

    def call(self, arguments: Any, seconds: float = math.inf) -> str:
        """The answer, however long it takes. Raises ToolError for arguments that do not fit, and what the function says
        with it."""
        self.check(arguments)
        found = self.function(**arguments)
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)

    def check(self, arguments: Any) -> None:
        """Raises ToolError for arguments that do not fit the schema."""
        parameters = self.schema["function"]["parameters"]
        properties = parameters["properties"]
        wanted = ", ".join(f"{name}: {_words(schema)}" for name, schema in properties.items()) or "no arguments"
        if not isinstance(arguments, Mapping):
            raise ToolError(f"{self.name}: arguments must be a JSON object with {wanted}")
        for name in arguments:
            if name not in properties:
                raise ToolError(f"{self.name} has no argument {str(name)[:60]!r}; it takes {wanted}")
        for name in parameters["required"]:
            if name not in arguments:
                raise ToolError(f"{self.name}: the argument {name} is missing; it takes {wanted}")
        for name, value in arguments.items():
            if not _fits(value, properties[name]):
                raise ToolError(f"{self.name}: the argument {name} must be {_words(properties[name])}")


def _schema(hint: Any, where: str) -> dict[str, Any]:
    if get_origin(hint) is Annotated:
        plain, *notes = get_args(hint)
        return {**_schema(plain, where), "description": next(note for note in notes if isinstance(note, str))}
    if hint in _NAMES:
        return {"type": _NAMES[hint]}
    if get_origin(hint) is Literal and all(isinstance(value, str) for value in get_args(hint)):
        return {"type": "string", "enum": list(get_args(hint))}
    if get_origin(hint) is list:
        return {"type": "array", "items": _schema(get_args(hint)[0], where)}
    raise TypeError(f"{where}: {hint} is no type that a schema can tell")


def _words(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return "one of " + ", ".join(map(repr, schema["enum"]))
    if schema["type"] == "array":
        return f"a list, each {_words(schema['items'])}"
    return {"string": "a string", "integer": "an integer", "number": "a number", "boolean": "true or false"}[
        schema["type"]
    ]


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    match schema["type"]:
        case "string":
            return isinstance(value, str) and value in schema.get("enum", [value])
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "boolean":
            return isinstance(value, bool)
    return isinstance(value, list) and all(_fits(item, schema["items"]) for item in value)

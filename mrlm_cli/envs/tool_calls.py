"""Tool calls in a reply: the forms that models' chat templates teach, and the tagged one for models without any.

    <tool_call>{"name": "calculator", "arguments": {"expression": "6*7"}}</tool_call>    Hermes, Qwen 2.5 and 3; tagged
    [TOOL_CALLS][{"name": "calculator", "arguments": {"expression": "6*7"}}]             Mistral
    <|python_tag|>{"name": "calculator", "parameters": {"expression": "6*7"}}            Llama 3, also without the tag

A reply's text is read as it stands; special tokens stay visible in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mrlm_cli.envs.tool_schema import ToolError

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_MISTRAL, _LLAMA = "[TOOL_CALLS]", "<|python_tag|>"
MOST_CALLS = 8  # in one reply
_HINT = f'write {OPEN}{{"name": "…", "arguments": {{…}}}}{CLOSE}'


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call as it was written; nothing is known yet to fit."""

    name: str
    arguments: Any


def calls(text: str) -> list[ToolCall]:
    """The calls of a reply, in order; none if it makes no attempt at one.

    Raises ToolError with what is wrong, if it begins a call that cannot be read.
    """
    if OPEN in text:
        return _limited([_call(_loaded(piece.partition(CLOSE)[0])) for piece in text.split(OPEN)[1:]])
    if _MISTRAL in text:
        listed = _loaded(text.partition(_MISTRAL)[2])
        return _limited([_call(each) for each in (listed if isinstance(listed, list) else [listed])])
    bare = text.partition(_LLAMA)[2] if _LLAMA in text else text
    if _LLAMA in text or (bare.lstrip().startswith("{") and '"name"' in bare):
        return [_call(_loaded(bare))]
    return []


def _loaded(text: str) -> Any:
    try:
        found, _ = json.JSONDecoder().raw_decode(text.lstrip())
    except (ValueError, RecursionError) as error:  # nesting without end is no JSON either
        said = getattr(error, "msg", "nested too deeply or too long a number")
        raise ToolError(f"the tool call is not JSON ({said}); {_HINT}") from error
    return found


def _call(fields: Any) -> ToolCall:
    if not isinstance(fields, Mapping) or not isinstance(fields.get("name"), str):
        raise ToolError(f"a tool call must be a JSON object with a name; {_HINT}")
    return ToolCall(fields["name"], fields.get("arguments", fields.get("parameters", {})))


def _limited(found: list[ToolCall]) -> list[ToolCall]:
    if len(found) > MOST_CALLS:
        raise ToolError(f"{len(found)} tool calls in one reply; make at most {MOST_CALLS}")
    return found

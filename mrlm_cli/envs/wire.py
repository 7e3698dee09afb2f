"""Records of a session as JSON, frames of a pipe, and the check that a turn keeps its environment's word."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import asdict
from numbers import Real
from pathlib import Path
from typing import Any

from mrlm_cli import blame
from mrlm_cli.envs.base import Environment
from mrlm_cli.errors import SessionFailure
from mrlm_cli.records import Message, Reply, Task, Turn

MAX_FRAME = 64 * 2**20  # bytes; a larger message is a mistake, and would stall the trainer
LARGEST = 1e9  # of a reward or fact: squares and sums of it stay far inside float32
MAX_FAILURE = 500  # characters of an exception's text
HEADER = struct.Struct(">I")
FOLDER = "mrlm-worker-"  # begins the name of a worker process's folder for temporary files
ROLES = ("system", "user", "assistant", "tool")


def check_turn(turn: Any, environment: Environment) -> Turn:
    """The same turn with plain floats. Raises SessionFailure if it breaks the environment's contract."""
    if not isinstance(turn, Turn):
        raise SessionFailure(f"a session must answer with a Turn, not {type(turn).__name__}")
    roles, declared = environment.roles(environment.config), environment.declared(environment.config)
    if turn.agent not in roles:
        raise SessionFailure(f"agent {turn.agent!r} is not one of {', '.join(roles)}")
    for message in turn.messages:
        _check_message(message)
    rewards: dict[str, dict[str, float]] = {}
    for agent, components in turn.rewards.items():
        if agent not in roles:
            raise SessionFailure(f"reward for agent {agent!r}, who is not one of {', '.join(roles)}")
        for component in components:
            if component not in declared:
                raise SessionFailure(
                    f"reward component {component!r} is not declared (declared: {', '.join(declared)})"
                )
        rewards[agent] = {name: _finite(value, f"reward {name!r}") for name, value in components.items()}
    facts = {_text(name, "a fact's name"): _finite(value, f"fact {name!r}") for name, value in turn.facts.items()}
    if turn.truncated and not turn.done:
        raise SessionFailure("a Turn that is truncated must be done as well")
    try:
        json.dumps(turn.tools, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SessionFailure(f"tools are not JSON: {error}") from error
    return Turn(
        tuple(turn.messages), turn.agent, tuple(turn.tools), rewards, bool(turn.done), bool(turn.truncated), facts
    )


def _check_message(message: Any) -> None:
    if not isinstance(message, Message):
        raise SessionFailure(f"messages must be of class Message, not {type(message).__name__}")
    if message.role not in ROLES:
        raise SessionFailure(f"role {message.role!r} is not one of {', '.join(ROLES)}")
    try:
        _text(message.content, "a message's content").encode()
    except UnicodeEncodeError as error:
        raise SessionFailure(f"a message's content is not valid Unicode: {error.reason}") from error


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise SessionFailure(f"{what} must be a string, not {type(value).__name__}")
    return value


def _finite(value: Any, what: str) -> float:
    if not isinstance(value, Real):
        raise SessionFailure(f"{what} must be a number, not {type(value).__name__}")
    number = float(value)
    if not math.isfinite(number) or abs(number) > LARGEST:
        raise SessionFailure(f"{what} is {number:g}")
    return number


def describe_exception(error: BaseException) -> str:
    """Type, text (cut if long) and place of an exception: in a person's own file if it went through one."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    text = text if len(text) <= MAX_FAILURE else text[:MAX_FAILURE] + " …"
    if isinstance(error, SessionFailure):
        return str(error)
    frame = blame.last(error)
    return f"{text} ({Path(frame.filename).name}:{frame.lineno})" if frame else text


def task_to_json(task: Task) -> dict[str, Any]:
    """A task as JSON-able dict."""
    return {"id": task.id, "env": task.env, "split": task.split, "index": task.index, "data": dict(task.data)}


def task_from_json(fields: Mapping[str, Any]) -> Task:
    """What `task_to_json` gave."""
    return Task(**fields)


def reply_to_json(reply: Reply) -> dict[str, Any]:
    """A reply as JSON-able dict."""
    return asdict(reply)


def reply_from_json(fields: Mapping[str, Any]) -> Reply:
    """What `reply_to_json` gave."""
    return Reply(_message_from_json(fields["message"]), fields["stop"])


def turn_to_json(turn: Turn) -> dict[str, Any]:
    """A checked turn as JSON-able dict."""
    return asdict(turn)


def turn_from_json(fields: Mapping[str, Any]) -> Turn:
    """What `turn_to_json` gave."""
    messages = tuple(_message_from_json(message) for message in fields["messages"])
    return Turn(**{**fields, "messages": messages, "tools": tuple(fields["tools"])})


def _message_from_json(fields: Mapping[str, Any]) -> Message:
    return Message(**{**fields, "tool_calls": tuple(fields["tool_calls"])})


def frame(fields: Mapping[str, Any]) -> bytes:
    """One message of the pipe: four bytes of length, then one line of JSON. Raises ValueError if it is too large."""
    line = json.dumps(fields, allow_nan=False).encode() + b"\n"
    if len(line) > MAX_FRAME:
        raise ValueError(f"a message of {len(line) / 2**20:.0f} MiB is over the limit of {MAX_FRAME // 2**20} MiB")
    return HEADER.pack(len(line)) + line

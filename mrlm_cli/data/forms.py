"""Columns of a row → transcripts, in the three forms that rows come in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mrlm_cli.data.base import AGENT, LABEL, PREFERRED, BadRow, Columns, Group, Row, RowSettings
from mrlm_cli.records import Message, Split, Task, Transcript

ROLES = ("system", "user", "assistant", "tool")
_FIELDS = {"role", "content", "name", "tool_calls", "tool_call_id"}
_OTHER_KEYS = {"from": "role", "value": "content"}  # of the other usual form of a message
_OTHER_ROLES = {"human": "user", "gpt": "assistant"}


def group(row: Row, config: RowSettings, index: int, split: Split) -> Group:
    """One transcript of forms chat and completion, two of form pairs, the preferred first. Raises BadRow."""
    if isinstance(row.fields, BadRow):
        raise row.fields
    fields, columns = row.fields, config.columns
    if config.form == "chat":
        messages = _messages(_column(fields, columns.messages), columns.messages)
        first = before(messages)
        _says_something(messages[first:], columns.messages)
        return (transcript(row.place, messages, first, index, split),)
    if config.form == "completion":
        prompt = _side(_column(fields, columns.prompt), columns.prompt, "user")
        reply = _side(_column(fields, columns.completion), columns.completion, "assistant")
        _begins_with_reply(reply, columns.completion)
        _says_something(reply, columns.completion)
        return (transcript(row.place, [*prompt, *reply], len(prompt), index, split),)
    chosen = _side(_column(fields, columns.chosen), columns.chosen, "assistant")
    rejected = _side(_column(fields, columns.rejected), columns.rejected, "assistant")
    if chosen == rejected:
        raise BadRow("both sides are equal")
    whole = all(side and side[0].role != "assistant" for side in (chosen, rejected))
    if fields.get(columns.prompt) is not None and not whole:
        prompt = _side(fields[columns.prompt], columns.prompt, "user")
    else:  # two whole conversations: the prompt is what they share, which a column of some datasets repeats
        common = 0
        while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
            common += 1
        prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
    for side, name in ((chosen, columns.chosen), (rejected, columns.rejected)):
        _begins_with_reply(side, name)
        if side[-1].role != "assistant":
            raise BadRow("a side does not end with the assistant's turn", f"column {name}")
    _says_something(chosen, columns.chosen)  # the other side may be worse for saying nothing
    if not prompt and fields.get(columns.prompt) is None:
        raise BadRow(f"column {columns.prompt} is missing", "the two sides share no beginning either")
    return tuple(
        transcript(row.place, [*prompt, *side], len(prompt), index, split, sample, (PREFERRED, 1.0 - sample))
        for sample, side in enumerate((chosen, rejected))
    )


def transcript(
    place: str,
    messages: Sequence[Message],
    given: int,
    index: int,
    split: Split,
    sample: int = 0,
    reward: tuple[str, float] | None = None,
) -> Transcript:
    """A finished session of which the first `given` messages are the prompt."""
    task = Task(str(index), LABEL, split, index, {"place": place, "given": given})
    replies = sum(message.role == "assistant" for message in messages[given:])
    rewards = () if reward is None else ((AGENT, replies - 1, *reward),)
    return Transcript(task, sample, {AGENT: tuple(messages)}, rewards, {}, "done")


def message(item: Any, where: str) -> Message:
    """One message of a row. Raises BadRow."""
    if not isinstance(item, Mapping):
        raise BadRow("a message is not a mapping", f"{where} holds {type(item).__name__}")
    given = {name: value for name, value in item.items() if value is not None}
    if "from" in given and not given.keys() & {"role", "content"}:
        given = {_OTHER_KEYS.get(name, name): value for name, value in given.items()}
        given["role"] = _OTHER_ROLES.get(str(given["role"]), given["role"])
    if unknown := sorted(given.keys() - _FIELDS):
        raise BadRow("a message has an unknown key", f"{where}: {unknown[0]}; known are {', '.join(sorted(_FIELDS))}")
    role, content, calls = given.get("role"), given.get("content"), given.get("tool_calls", ())
    if role not in ROLES:
        raise BadRow("a message has an unknown role", f"{where}: {role!r}; known are {', '.join(ROLES)}")
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise BadRow("a message's content is not text", f"{where}: {type(content).__name__}")
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise BadRow("tool_calls is not a list", where)
    for name in ("name", "tool_call_id"):
        if not isinstance(given.get(name, ""), str):
            raise BadRow(f"a message's {name} is not text", where)
    _check_unicode(content, where)
    return Message(role, content, given.get("name"), tuple(calls), given.get("tool_call_id"))


def likely(fields: Mapping[str, Any], columns: Columns) -> str | None:
    """The form whose columns a row has, if any."""
    needed = {
        "pairs": (columns.chosen, columns.rejected),
        "completion": (columns.prompt, columns.completion),
        "chat": (columns.messages,),
    }
    return next((form for form, names in needed.items() if all(fields.get(name) is not None for name in names)), None)


def conversation(fields: Mapping[str, Any]) -> str | None:
    """The column of a row that holds a list of messages, if it is one alone."""
    found = [name for name, value in fields.items() if isinstance(value, list) and value and all(map(_speaks, value))]
    return found[0] if len(found) == 1 else None


def _speaks(item: Any) -> bool:
    return isinstance(item, Mapping) and bool(item.keys() & {"role", "from"})


def _column(fields: Mapping[str, Any], name: str) -> Any:
    if fields.get(name) is None:
        raise BadRow(f"column {name} is missing", f"the row has {', '.join(map(str, fields)) or 'none'}")
    return fields[name]


def _messages(value: Any, where: str) -> list[Message]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise BadRow(f"column {where} is not a list of messages", type(value).__name__)
    return [message(item, where) for item in value]


def _side(value: Any, where: str, role: str) -> list[Message]:
    """A text as one message of `role`, or a list of messages."""
    if isinstance(value, str):
        _check_unicode(value, where)
        return [Message(role, value)]
    return _messages(value, where)


def before(messages: Sequence[Message]) -> int:
    """How many messages come before the first reply. Raises BadRow if there is none."""
    for place, each in enumerate(messages):
        if each.role == "assistant":
            return place
    raise BadRow("no assistant turn")


def _begins_with_reply(messages: Sequence[Message], where: str) -> None:
    if not messages or messages[0].role != "assistant":
        found = f"begins with {messages[0].role}" if messages else "is empty"
        raise BadRow("a reply does not begin with the assistant's turn", f"column {where} {found}")


def _says_something(messages: Sequence[Message], where: str) -> None:
    """Raises BadRow where no reply has a word or a call: all that could be learnt from it is to end at once."""
    replies = [each for each in messages if each.role == "assistant"]
    if not any(each.content.strip() or each.tool_calls for each in replies):
        raise BadRow("the assistant says nothing", f"column {where}")


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow("a text is not valid Unicode", f"column {where}: {error.reason}") from error

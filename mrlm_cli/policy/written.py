"""A finished conversation as tokens: what a rollout's conversation would hold, had the policy said these words.

messages   system user | assistant | user | assistant        given = 2
tokens     P0            A0          E0     A1                spans: prompt, chosen, observation, chosen
"""

from __future__ import annotations

from collections.abc import Sequence

from mrlm_cli.policy.chat import Chat
from mrlm_cli.records import Message, Span, SpanKind


def given(messages: Sequence[Message]) -> int:
    """How many messages come before the first reply. Raises ValueError if there is no reply."""
    for place, message in enumerate(messages):
        if message.role == "assistant":
            return place
    raise ValueError("the conversation holds no assistant turn")


def written(chat: Chat, messages: Sequence[Message], prompt: int) -> tuple[tuple[int, ...], tuple[Span, ...]]:
    """(tokens, spans) of a conversation whose first `prompt` messages, replies among them too, are the prompt.

    Every later message of the assistant is a chosen span that ends with its end token; messages after the last reply
    are observed. `messages[prompt]` must be the assistant's. Raises UserError if the chat template refuses.
    """
    assert messages[prompt].role == "assistant"
    tokens: list[int] = []
    spans: list[Span] = []

    def append(kind: SpanKind, new: Sequence[int], turn: int) -> None:
        spans.append(Span(len(tokens), len(tokens) + len(new), kind, turn))
        tokens.extend(new)

    for kind, new in chat.open(messages[:prompt]):
        append(kind, new, 0)
    turn, place = 0, prompt
    while True:
        reply = chat.write(messages[place])
        append("chosen", reply, turn)
        turn, place = turn + 1, place + 1
        heard = place
        while place < len(messages) and messages[place].role != "assistant":
            place += 1
        if heard == len(messages):
            return tuple(tokens), tuple(spans)
        for kind, new in chat.follow(reply, "end", messages[heard:place]):
            append(kind, new, turn)
        if place == len(messages):
            return tuple(tokens), tuple(spans)

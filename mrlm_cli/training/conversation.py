"""One agent's view of one session as tokens: append-only, and the only place where a chosen span is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mrlm_cli.records import Completion, Limits, Message, Reply, ReplyStop, Request, Span, SpanKind

if TYPE_CHECKING:
    from mrlm_cli.policy.chat import Chat


class Conversation:
    """Builds `tokens`, `spans`, `logprobs` and `rewards` of an episode, one turn at a time."""

    def __init__(self, chat: Chat, name: str, draw_key: bytes, max_tokens: int) -> None:
        self.name = name
        self.tokens: list[int] = []
        self.spans: list[Span] = []
        self.logprobs: list[float] = []
        self.rewards: list[float] = []
        self.view: list[Message] = []
        self.turn = 0  # replies given so far
        self.last_stop: ReplyStop | None = None
        self.asked = 0  # tokens of what the agent was to see last, whether there was room for them or not
        self._chat = chat
        self._draw_key = draw_key
        self._max_tokens = max_tokens
        self._reply: tuple[int, ...] = ()
        self._stop_strings: tuple[str, ...] = ()
        self._carried = 0.0  # reward that came before the first chosen token

    @property
    def room(self) -> int:
        """Tokens that may still be added."""
        return self._max_tokens - len(self.tokens)

    def hear(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> bool:
        """Append what the agent sees before it speaks; False, and no token appended, if none would be left to say."""
        self.view.extend(messages)
        if self.turn == 0:
            pieces = self._chat.open(messages, tools)
        else:
            assert self.last_stop is not None
            pieces = self._chat.follow(self._reply, self.last_stop, messages, tools)
        self.asked = sum(len(tokens) for _, tokens in pieces)
        if self.asked >= self.room:
            return False
        for kind, tokens in pieces:
            self._append(kind, tokens, (0.0,) * len(tokens))
        return True

    def request(self, limits: Limits) -> Request:
        """Ask for the next reply."""
        self._stop_strings = limits.stop_strings
        limits = replace(limits, max_new_tokens=min(limits.max_new_tokens, self.room))
        return Request(self.name, tuple(self.tokens), self._draw_key, limits)

    def say(self, completion: Completion, policy_step: int) -> Reply:
        """Append the policy's own tokens as they were sampled."""
        self._append("chosen", completion.tokens, completion.logprobs, policy_step)
        self.rewards[-1] += self._carried
        self._carried = 0.0
        self._reply, self.last_stop = completion.tokens, completion.stop
        self.turn += 1
        message = self._chat.read(completion.tokens, completion.stop, self._stop_strings)
        self.view.append(message)
        return Reply(message, completion.stop)

    def reward(self, value: float) -> None:
        """Give a reward to the agent's most recent chosen token, or to its first one if it has not acted yet."""
        for span in reversed(self.spans):
            if span.kind == "chosen":
                self.rewards[span.end - 1] += value
                return
        self._carried += value

    def _append(self, kind: SpanKind, tokens: Sequence[int], logprobs: Sequence[float], policy_step: int = -1) -> None:
        if not tokens:
            return
        start = len(self.tokens)
        self.tokens.extend(tokens)
        self.logprobs.extend(logprobs)
        self.rewards.extend([0.0] * len(tokens))
        self.spans.append(Span(start, len(self.tokens), kind, self.turn, policy_step))

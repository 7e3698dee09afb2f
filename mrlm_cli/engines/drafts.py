"""Completions while they grow: when a row ends, and which requests are refused. Both engines share these rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from mrlm_cli.draws import uniforms
from mrlm_cli.errors import EngineError
from mrlm_cli.records import Completion, ReplyStop, Request


class Draft:
    """The completion of one request, token by token. `stop` is None while it grows."""

    __slots__ = ("_decode", "_ends", "logprobs", "request", "stop", "tokens")

    def __init__(self, request: Request, decode: Callable[[Sequence[int]], str]) -> None:
        self.request = request
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.stop: ReplyStop | None = None
        self._decode = decode
        self._ends = frozenset(() if request.limits.ignore_end else request.limits.end_tokens)

    def draw(self) -> tuple[float, float]:
        """The two uniforms of the next token: a function of the draw key and its absolute position."""
        if self.request.limits.temperature == 0:
            return (0.0, 0.0)
        return uniforms(self.request.draw_key, len(self.request.tokens) + len(self.tokens))

    def add(self, token: int, logprob: float) -> None:
        """Append a token and see whether it ends the completion. Raises EngineError if the log-prob is not finite."""
        if not math.isfinite(logprob):
            position = len(self.request.tokens) + len(self.tokens)
            raise EngineError(
                f"conversation {self.request.conversation!r}: the policy's logits at position {position} are not finite"
            )
        self.tokens.append(token)
        self.logprobs.append(logprob)
        limits = self.request.limits
        if token in self._ends:
            self.stop = "end"
        elif limits.stop_strings and self._has_stop_string():
            self.stop = "string"
        elif len(self.tokens) >= limits.max_new_tokens:
            self.stop = "length"

    def completion(self) -> Completion:
        """The finished completion."""
        assert self.stop is not None
        return Completion(tuple(self.tokens), tuple(self.logprobs), self.stop)

    def _has_stop_string(self) -> bool:
        text = self._decode(self.tokens)  # the whole reply: a tail alone may decode to other characters
        return any(stop in text for stop in self.request.limits.stop_strings)


def check_requests(requests: Sequence[Request], held: Mapping[str, tuple[int, ...]], context: int | None) -> None:
    """Raise EngineError for the first request that cannot be answered.

    `held` maps a conversation to all tokens it has so far, `context` is the most positions the model has.
    """
    seen: set[str] = set()
    for request in requests:
        name, length, limits = request.conversation, len(request.tokens), request.limits
        if name in seen:
            raise EngineError(f"conversation {name!r} is asked for twice in one call")
        seen.add(name)
        if not length:
            raise EngineError(f"conversation {name!r} has no tokens to continue")
        if limits.max_new_tokens < 1:
            raise EngineError(
                f"conversation {name!r}: max_new_tokens is {limits.max_new_tokens}; it must be at least 1"
            )
        if limits.temperature < 0:
            raise EngineError(f"conversation {name!r}: temperature is {limits.temperature}; it must not be negative")
        if context is not None and length + limits.max_new_tokens - 1 > context:
            raise EngineError(
                f"conversation {name!r}: {length} tokens and {limits.max_new_tokens} new ones do not fit "
                f"the model's context of {context}"
            )
        before = held.get(name, ())
        if request.tokens[: len(before)] != before:
            raise EngineError(
                f"conversation {name!r} is append-only: its new tokens do not begin with the {len(before)} it holds"
            )

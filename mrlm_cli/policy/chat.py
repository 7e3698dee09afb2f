"""The only door between messages and tokens.

    open(messages)          ->  prompt                       the conversation so far, and the header of a reply
    follow(reply, messages) ->  scaffold, observation        the reply's closing; the new messages and the next header
    read(reply)             ->  Message                      what the policy said

Only new messages are ever rendered: a conversation's tokens are appended to, never made again. What a template adds
after a reply is found by rendering a stand-in conversation, so that templates which rewrite older replies do no harm.
Text inside messages that spells a special token is encoded as ordinary text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from mrlm_cli.errors import UserError
from mrlm_cli.recipe.sections import Chat as ChatSection
from mrlm_cli.records import Message, ReplyStop, SpanKind

Spans = list[tuple[SpanKind, tuple[int, ...]]]
REPLY = "mrlm-stand-in-reply"  # plain letters: templates may trim or escape anything else


class Chat:
    """Messages to tokens and back, by the tokenizer's chat template (`model`) or by joining contents (`plain`).

    `end_tokens`: what ends a reply, the template's own end of turn first. `vocabulary`: width of the logits. `context`:
    tokens the model can see. Raises UserError if the recipe asks for a template that is not there, or if nothing is
    known to end a reply.
    """

    def __init__(self, tokenizer: Any, section: ChatSection, *, vocabulary: int, context: int) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.context = context
        self._system = section.system
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if section.template == "model" and not has_template:
            raise UserError("model.chat.template is model, but this tokenizer has no chat template; use plain")
        self._plain = section.template == "plain" or not has_template
        self._special = {int(index): str(token) for index, token in _special_tokens(tokenizer).items()}
        self._numbers = {token: index for index, token in self._special.items()}
        longest_first = sorted(self._numbers, key=len, reverse=True)
        self._spelled = re.compile("|".join(re.escape(token) for token in longest_first) or r"(?!)")
        self._closing = () if self._plain else self._tail((), (), header=False)
        self.end_tokens = self._find_end_tokens()

    def open(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Spans:
        """The prompt of the first turn, with the system message of the recipe and the header of the reply.

        In plain mode a beginning-of-text token comes first where the tokenizer puts one; an empty prompt becomes one
        end token, since the first token of an episode is never chosen.
        """
        if self._system is not None and all(message.role != "system" for message in messages):
            messages = [Message("system", self._system), *messages]
        if self._plain:
            tokens = self._beginning + self._joined(messages)
        else:
            guard = _guard(messages)
            tokens = self._encode(self._render(messages, tools, guard, header=True), guard)
        return [("prompt", tokens or self.end_tokens[:1])]

    def follow(
        self,
        reply: Sequence[int],
        stop: ReplyStop,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Spans:
        """What comes after the policy's tokens: the closing of its reply, then the new messages and the next header.

        The closing is the template's (in plain mode the end token), without its end token if the policy sampled that
        one itself; a reply that was cut or ended at a stop string is so closed for it. `messages` may be empty: the
        template's next header still follows. Spans without tokens are left out.
        """
        if self._plain:
            closing, new = self.end_tokens[:1], self._joined(messages)
        else:
            tail = self._tail(messages, tools, header=True)
            common = 0
            while common < min(len(tail), len(self._closing)) and tail[common] == self._closing[common]:
                common += 1
            closing, new = tail[:common], tail[common:]
        if stop == "end" and reply and reply[-1] in closing:
            closing = closing[closing.index(reply[-1]) + 1 :]
        spans: Spans = [("scaffold", closing), ("observation", new)]
        return [(kind, tokens) for kind, tokens in spans if tokens]

    def read(self, reply: Sequence[int], stop: ReplyStop, stop_strings: Sequence[str] = ()) -> Message:
        """The policy's tokens as an assistant message.

        A sampled end token at the end is left out. A reply that ended at a stop string is cut before the first of
        `stop_strings` in it (the token that completes one may carry more text behind it). Other special tokens stay
        visible as text.
        """
        tokens = list(reply)
        if stop == "end" and tokens and tokens[-1] in self.end_tokens:
            tokens.pop()
        text = self.decode(tokens)
        if stop == "string":
            found = [text.find(string) for string in stop_strings if string in text]
            text = text[: min(found)] if found else text
        return Message("assistant", text)

    def reply(self, text: str) -> tuple[int, ...]:
        """The tokens of a reply with this text that came to its end: what `read` reads back."""
        guard = _guard((Message("assistant", text),))
        return (*self._encode(self._marked(text, guard), guard), self.end_tokens[0])

    def write(self, message: Message) -> tuple[int, ...]:
        """An assistant's message as the policy would have to write it after the header, the end token last.

        The template's own words where it writes the message behind its header (tool calls, trimmed text), else the
        content. Raises UserError for tool calls without a template.
        """
        guard = _guard([message])
        if not self._plain:
            asked = [Message("user", "x")]
            header = self._render(asked, (), guard, header=True)
            whole = self._render([*asked, message], (), guard, header=False)
            if whole.startswith(header):
                tokens = self._encode(whole[len(header) :], guard)
                ends = [place for place, token in enumerate(tokens) if token in self.end_tokens]
                if ends:
                    return tokens[: ends[0] + 1]
        if message.tool_calls:
            raise UserError("a message with tool calls cannot be written without a chat template that knows them")
        return self.reply(message.content)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones included, nothing cleaned away."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _find_end_tokens(self) -> tuple[int, ...]:
        ends = [token for token in self._closing if token in self._special][:1]
        if self.tokenizer.eos_token_id is not None:
            ends.append(int(self.tokenizer.eos_token_id))
        if not ends:
            raise UserError("this tokenizer names no end token, so no reply could ever end")
        return tuple(dict.fromkeys(ends))

    @cached_property
    def _beginning(self) -> tuple[int, ...]:
        """The beginning-of-text token, where the tokenizer itself puts one before a text."""
        first = self.tokenizer.bos_token_id
        whole = self.tokenizer("a").input_ids
        return (int(first),) if first is not None and whole[:1] == [first] else ()

    def _joined(self, messages: Sequence[Message]) -> tuple[int, ...]:
        guard = _guard(messages)
        return self._encode(self._marked("".join(message.content for message in messages), guard), guard)

    def _tail(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, header: bool
    ) -> tuple[int, ...]:
        """What a template writes after a reply that these messages follow."""
        guard = _guard(messages)
        stand_in = [Message("user", "x"), Message("assistant", REPLY), *messages]
        _, found, after = self._render(stand_in, tools, guard, header=header).partition(REPLY)
        if not found:
            raise UserError("the chat template leaves out the assistant's reply; set model.chat.template to plain")
        return self._encode(after, guard)

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], guard: str, *, header: bool
    ) -> str:
        conversation = [self._marked(_as_dict(message), guard) for message in messages]
        try:
            text: str = self.tokenizer.apply_chat_template(
                conversation,
                tools=[dict(tool) for tool in tools] or None,
                tokenize=False,
                add_generation_prompt=header,
            )
        except Exception as error:  # a border: a template is a program of the model's maker and may raise anything
            roles = ", ".join(message.role for message in messages)
            raise UserError(f"the model's chat template refuses messages of {roles}: {error}") from error
        return text

    def _marked(self, item: Any, guard: str) -> Any:
        """`item` with every special token that its strings spell replaced by a mark, `guard` around its number."""
        if isinstance(item, str):
            return self._spelled.sub(lambda match: f"{guard}{self._numbers[match.group()]}{guard}", item)
        if isinstance(item, Mapping):
            return {key: self._marked(value, guard) for key, value in item.items()}
        if isinstance(item, list | tuple):
            return [self._marked(value, guard) for value in item]
        return item

    def _encode(self, text: str, guard: str) -> tuple[int, ...]:
        """Tokens of a text: the template's special tokens as such, marks as the ordinary text they stand for."""
        tokens: list[int] = []
        for place, piece in enumerate(re.split(f"{guard}(\\d+){guard}", text)):
            if place % 2:
                tokens += self._ordinary(self._special[int(piece)])
            elif piece:
                tokens += self._ids(piece)
        return tuple(tokens)

    def _ids(self, text: str) -> list[int]:
        """Tokens of a text as it stands; from the backend itself, as transformers' wrapping costs ten times as much."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            return ids
        if backend.encode_special_tokens:  # left so by a call that split special tokens
            backend.encode_special_tokens = False
        found: list[int] = backend.encode(text, add_special_tokens=False).ids
        return found

    def _ordinary(self, text: str) -> list[int]:
        """A special token's spelling as ordinary tokens; character by character if the tokenizer insists on it."""
        whole: list[int] = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        ).input_ids
        if not any(self._special.get(token) == text for token in whole):
            return whole
        return [
            token
            for letter in text
            for token in self.tokenizer(letter, add_special_tokens=False, verbose=False).input_ids
        ]


def _special_tokens(tokenizer: Any) -> dict[int, str]:
    """id -> text of every token that a tokenizer gives a meaning beyond its text."""
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return named | added


def _as_dict(message: Message) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        fields["name"] = message.name
    if message.tool_calls:
        fields["tool_calls"] = list(message.tool_calls)
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    return fields


def _guard(messages: Sequence[Message]) -> str:
    """A character of Unicode's private use area that is in no string of the messages."""
    used = {character for message in messages for text in _strings(_as_dict(message)) for character in text}
    return next(character for character in map(chr, range(0xE000, 0xF8FF)) if character not in used)


def _strings(item: Any) -> Iterator[str]:
    if isinstance(item, str):
        yield item
    elif isinstance(item, Mapping):
        for value in item.values():
            yield from _strings(value)
    elif isinstance(item, list | tuple):
        for value in item:
            yield from _strings(value)

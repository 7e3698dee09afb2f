"""Rewards of what a reply looks like: a pattern, the task's answer, its length, its tags, its words.

All but `length` look at an agent's last reply, which is where the answer of several turns stands.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mrlm_cli.errors import MissingExtra, UserError
from mrlm_cli.records import Transcript
from mrlm_cli.rewards.base import RewardSettings, TextReward
from mrlm_cli.strict import Names, Strings

_WORD = re.compile(r"\w+(?:['’-]\w+)*")
MOST_SCORED = 1000  # characters given to the sentiment lexicon, whose time grows with their square


class Regex(TextReward):
    """1 if a regular expression matches the last reply, else 0."""

    class Config(RewardSettings):
        """What must match, and where."""

        pattern: Annotated[str, Field(min_length=1, max_length=10_000)]
        """A regular expression of Python; `.` stands for line ends too."""
        match: Literal["search", "full"] = "search"
        """Anywhere in the reply, or the whole of it."""

        @field_validator("pattern")
        @classmethod
        def _compiles(cls, pattern: str) -> str:
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"{pattern!r:.80} is no regular expression: {error}") from error
            return pattern

    config: Config

    def value(self, transcript: Transcript, replies: Sequence[str]) -> float:
        """Whether the last reply matches."""
        pattern = re.compile(self.config.pattern, re.DOTALL)
        find = pattern.fullmatch if self.config.match == "full" else pattern.search
        return float(find(replies[-1] if replies else "") is not None)


class Exact(TextReward):
    """1 if the last reply is the text in the task's data, else 0."""

    class Config(RewardSettings):
        """What the reply is compared with."""

        key: str = "answer"
        """Where the right reply stands in the task's data; a task without it fails."""
        strip: bool = True
        """Blanks around both texts do not count."""
        casefold: bool = False
        """Upper and lower case are the same."""

    config: Config

    def value(self, transcript: Transcript, replies: Sequence[str]) -> float:
        """Whether the last reply is right. Raises KeyError where the task has no such text."""
        data = transcript.task.data
        if self.config.key not in data:
            raise KeyError(f"the task's data has no {self.config.key!r}; it has {', '.join(data) or 'nothing'}")
        texts = [str(data[self.config.key]), replies[-1] if replies else ""]
        if self.config.strip:
            texts = [text.strip() for text in texts]
        if self.config.casefold:
            texts = [text.casefold() for text in texts]
        return float(texts[0] == texts[1])


class Length(TextReward):
    """1 while the replies together are as long as wanted, falling linearly to 0 over `slack` beyond either end."""

    class Config(RewardSettings):
        """How long is right."""

        unit: Literal["characters", "words"] = "characters"
        """What is counted; words stand between blanks."""
        shortest: Annotated[int, Field(ge=0, le=10_000_000)] = 0
        """Least length that is worth 1."""
        longest: Annotated[int, Field(ge=0, le=10_000_000)]
        """Greatest length that is worth 1."""
        slack: Annotated[int, Field(ge=1, le=10_000_000)] = 1
        """How far beyond an end the worth has come down to 0."""

        @model_validator(mode="after")
        def _fits(self) -> Length.Config:
            if self.shortest > self.longest:
                raise ValueError(f"shortest ({self.shortest}) is above longest ({self.longest})")
            return self

    config: Config

    def value(self, transcript: Transcript, replies: Sequence[str]) -> float:
        """How near the length is to what is wanted."""
        length = sum(len(text.split()) if self.config.unit == "words" else len(text) for text in replies)
        beyond = max(0, self.config.shortest - length, length - self.config.longest)
        return max(0.0, 1.0 - beyond / self.config.slack)


class Format(TextReward):
    """Tagged parts in their order, such as <think>…</think><answer>…</answer>.

    1 if the last reply is nothing but the parts, each once, in their order, and none inside another; otherwise half of
    the share of tags that open once and close once behind it.
    """

    class Config(RewardSettings):
        """Which tags."""

        tags: Annotated[Strings, Field(min_length=1)] = ("think", "answer")
        """Names of the tags, in their order."""

        @field_validator("tags")
        @classmethod
        def _names(cls, tags: tuple[str, ...]) -> tuple[str, ...]:
            if any(not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", tag) for tag in tags) or len(set(tags)) != len(tags):
                raise ValueError("tags are distinct names of letters, digits, _ and -")
            return tags

    config: Config

    def value(self, transcript: Transcript, replies: Sequence[str]) -> float:
        """How well the parts are made."""
        text = replies[-1].strip() if replies else ""
        well, rest = 0, text
        for tag in self.config.tags:
            begin, end = f"<{tag}>", f"</{tag}>"
            well += text.count(begin) == text.count(end) == 1 and text.index(begin) < text.index(end)
            rest = rest.partition(end)[2].lstrip() if rest.startswith(begin) and end in rest else "?"
        if well == len(self.config.tags) and not rest:
            return 1.0
        return 0.5 * well / len(self.config.tags)


class Lexicon(TextReward):
    """Mean score of the words of the last reply in a list of words, in [-1, 1]; other words count 0.

    Without a list of one's own it is the VADER lexicon's compound score of sentiment (extra `sentiment`; Hutto and
    Gilbert 2014), of the reply's first 1000 characters.
    """

    class Config(RewardSettings):
        """Which words."""

        words: dict[str, Annotated[float, Field(ge=-1, le=1)]] = Field(default_factory=dict)
        """Score of each word, in lower case."""
        path: Annotated[str | None, Names("file")] = None
        """A file of words, one a line, with a score behind a tab where it is not 1; instead of words."""

        @model_validator(mode="after")
        def _fits(self) -> Lexicon.Config:
            for word in self.words:
                if word != word.lower() or not _WORD.fullmatch(word):
                    raise ValueError(f"{word!r:.60} would match nothing: expected one word in lower case")
            if self.words and self.path is not None:
                raise ValueError("give words or path, not both")
            return self

        @property
        def needed_extras(self) -> tuple[str, ...]:
            """See Strict."""
            return () if self.words or self.path is not None else ("sentiment",)

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not config.words and config.path is None:
            _vader()

    def value(self, transcript: Transcript, replies: Sequence[str]) -> float:
        """The mean score of the last reply's words; 0 for no words."""
        text = replies[-1] if replies else ""
        if not self._scores:
            return float(_vader().polarity_scores(text[:MOST_SCORED])["compound"])
        words = _WORD.findall(text.lower())
        return sum(self._scores.get(word, 0.0) for word in words) / max(1, len(words))

    @cached_property
    def _scores(self) -> Mapping[str, float]:
        return _read(Path(self.config.path)) if self.config.path is not None else self.config.words


def _read(path: Path) -> dict[str, float]:
    scores: dict[str, float] = {}
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        word, _, score = line.strip().partition("\t")
        if not word:
            continue
        try:
            scores[word.lower()] = float(score) if score else 1.0
        except ValueError as error:
            raise UserError(f"{path}:{number}: {score!r} is no score") from error
        if not -1 <= scores[word.lower()] <= 1:
            raise UserError(f"{path}:{number}: a score is between -1 and 1, not {score}")
    if not scores:
        raise UserError(f"{path} holds no word")
    return scores


@cache
def _vader() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise MissingExtra("the reward lexicon without words of its own", "sentiment") from error
    return SentimentIntensityAnalyzer()

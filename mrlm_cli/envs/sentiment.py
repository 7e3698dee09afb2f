"""Sentiment: continue the opening of a review so that it sounds positive."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from itertools import pairwise, product
from typing import Annotated, Any, ClassVar

from pydantic import Field

from mrlm_cli.draws import shuffled
from mrlm_cli.envs.base import Environment
from mrlm_cli.envs.single import SingleReply
from mrlm_cli.envs.splits import split_classes
from mrlm_cli.errors import MissingExtra
from mrlm_cli.records import Reply, Split, Task
from mrlm_cli.strict import EnvironmentSettings

MOST_SCORED = 1000  # characters; the scorer takes quadratic time, above a second for 2000 emoji
EXACT_ABOVE = 0.5  # compound score from which a continuation counts as positive
_EXPERIENCES = {
    "I saw this film": ("the story", "the acting", "the music", "the ending"),
    "We ate at this restaurant": ("the soup", "the service", "the dining room", "the dessert"),
    "We stayed at this hotel": ("our room", "the staff", "the breakfast", "the location"),
    "I bought this phone": ("the screen", "the battery", "the camera", "the sound"),
    "I read this novel": ("the first chapter", "the main character", "the language", "the last page"),
    "I took this walking tour": ("our guide", "the route", "the pace", "the group"),
    "I ordered this jacket": ("the fabric", "the colour", "the zip", "the fit"),
    "I signed up for this course": ("the teacher", "the first lesson", "the homework", "the final project"),
}
_OCCASIONS = (
    "last weekend", "in March", "with my sister", "after a long day", "for the second time",
    "on a rainy Tuesday", "during the holidays", "with two colleagues", "a month ago", "without any plan",
)  # fmt: skip
_TURNS = (
    "{Aspect} was",
    "To my surprise, {aspect} was",
    "Some things went well, others did not. {Aspect} was",
    "A friend had warned me about it. Still, {aspect} was",
)


class Sentiment(Environment):
    """Continue one of 1280 openings of reviews, composed of an experience, an occasion, an aspect and a turn of phrase.

    Components: `positive`, the compound score in [-1, 1] that the VADER lexicon gives to the continuation alone, its
    first 1000 characters (Hutto and Gilbert 2014); `exact`, 1 if that is above 0.5. Fact: `distinct_bigrams`, the
    share of distinct pairs of neighbouring words, which falls when a policy repeats itself to please the lexicon.

    Splits share no opening, but they share the parts that openings are composed of. Needs the extra `sentiment`:
    making an instance raises MissingExtra without it.
    """

    class Config(EnvironmentSettings):
        """How the opening is put."""

        instruction: Annotated[str, Field(max_length=10_000)] = "Continue this review: "
        """Text before the opening; empty for a model that continues plain text (with chat.template plain)."""

        @property
        def needed_extras(self) -> tuple[str, ...]:
            """See Strict."""
            return ("sentiment",)

    components: ClassVar[dict[str, float]] = {"positive": 1.0, "exact": 0.0}
    audited: ClassVar[bool] = True
    single_reply: ClassVar[bool] = True
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._score = _scorer()

    def size(self, split: Split) -> int:
        """Openings in the split."""
        return len(_openings()[split])

    def task(self, split: Split, index: int) -> Task:
        """Opening number `index` of the split. Raises ValueError outside range(size)."""
        openings = _openings()[split]
        if not 0 <= index < len(openings):
            raise ValueError(f"{split} has no task {index}")
        return Task(f"{split}/{index}", self.config.label, split, index, {"opening": openings[index]})

    def open(self, task: Task, seed: int) -> SingleReply:
        """Show the opening; nothing depends on the seed."""
        return SingleReply(self.config.instruction + task.data["opening"], self._judge)

    def _judge(self, reply: Reply) -> tuple[Mapping[str, float], Mapping[str, float]]:
        text = reply.message.content
        positive = self._score(text[:MOST_SCORED])
        words = text.lower().split()
        pairs = list(pairwise(words))
        facts = {"distinct_bigrams": len(set(pairs)) / len(pairs)} if pairs else {}
        return {"positive": positive, "exact": float(positive > EXACT_ABOVE)}, facts

    def oracle(self, task: Task) -> str:
        """A positive continuation."""
        return "wonderful, and I would happily recommend it to everyone."


@cache
def _openings() -> dict[Split, list[str]]:
    openings = [
        f"{experience} {occasion}. {turn.format(aspect=aspect, Aspect=aspect.capitalize())}"
        for experience, aspects in _EXPERIENCES.items()
        for occasion, aspect, turn in product(_OCCASIONS, aspects, _TURNS)
    ]
    splits = split_classes(openings)
    return {split: [openings[i] for i in shuffled(chosen, "sentiment", split)] for split, chosen in splits.items()}


@cache
def _scorer() -> Callable[[str], float]:
    """The compound score of a text."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise MissingExtra("the environment sentiment", "sentiment") from error
    analyzer: Any = SentimentIntensityAnalyzer()
    return lambda text: float(analyzer.polarity_scores(text)["compound"])

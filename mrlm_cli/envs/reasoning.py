"""Reasoning: the procedural tasks of reasoning-gym, one by name or several as a weighted mixture."""

from __future__ import annotations

import copy
import difflib
import hashlib
import importlib.util
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from mrlm_cli.draws import draw_key, integer
from mrlm_cli.envs.base import Environment
from mrlm_cli.envs.global_random import OwnRandom
from mrlm_cli.envs.math_answers import extract
from mrlm_cli.envs.reasoning_answers import harmless
from mrlm_cli.envs.single import SingleReply
from mrlm_cli.errors import MissingExtra, SessionFailure, UserError
from mrlm_cli.records import Reply, Split, Task
from mrlm_cli.strict import EnvironmentSettings

ATTEMPTS = 64  # entries that are looked through for one of the wanted split; 0.8 ** 64 is below one in a million
TOGETHER = 32  # questions of a split that share a dataset: to make one takes some tasks half a second
LONGEST = 20_000  # characters of an answer that a scorer is shown; no right answer comes near
JUNK = ("", "lorem ipsum dolor", "[]", "{}")  # answers that say nothing: what they earn is worth nothing
CONSOLATION = 0.05  # what many scorers pay for any answer of the right type; no more than this is worth nothing
Parameters = tuple[tuple[str, Any], ...]  # of a task, sorted by name, hashable
_SPLITS: tuple[Split, ...] = get_args(Split)
_INSTRUCTIONS = {
    "tagged": "\nPut the final answer between <answer> and </answer>.",
    "bare": "\nAnswer with just the answer.",
}

_OWN = "its scorer does not give 1 to its own answer"
UNUSABLE: dict[str, str] = {
    "boxnet": _OWN,
    "composite": "it is a mixture itself; name the tasks that it shall hold",
    "graph_color": _OWN,
    "propositional_logic": _OWN,
    "rubiks_cube": _OWN,
    "rush_hour": _OWN,
    "game_of_life_halting": "its scorer gives 1 to answers that say nothing",
    "puzzle24": "its scorer does not ask for the numbers of the question",
    "intermediate_integration": "some of its own answers are integrals left undone",
    "codeio": "it gives other questions for the same seed",
}
"""Tasks that cannot be trained on, and why."""


class Reasoning(Environment):
    """Answer a question of reasoning-gym 0.1.25 (extra `reasoning`).

    Components: `score`, what the task's own scorer pays for the answer, in [0, 1]; `format`, 1 if the reply ended by
    itself with the answer where it is asked for; `exact`, 1 for a score of 1 in that form.

    Traps of the scorers are shut here: an empty answer is not shown to them, nor, where they have Python evaluate it,
    one that is no plain expression (`reasoning_answers`): it is worth 0. So is a score of at most 0.05, or at most what
    they pay for an answer that says nothing, and an answer that they cannot read (they raise), or that keeps them busy
    (the fact `hung`). A score that is no number in [0, 1] fails the session. Tasks whose scorers or generators are
    broken are refused by name, with the reason.

    A split has its own seeds, and besides takes only questions whose text (without case, digits kept) hashes into its
    share: three fifths to train on, a fifth each to validate and test; so no split shares a question with another.
    There is no end of questions, but a small task repeats its own.
    """

    class Config(EnvironmentSettings):
        """Which tasks."""

        tasks: Annotated[dict[str, Annotated[float, Field(gt=0, le=1e6)]], Field(min_length=1)]
        """Weight of each task by its name in reasoning-gym, such as {chain_sum: 1, countdown: 2}."""
        settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
        """Parameters of a task by its name, as reasoning-gym calls them: {chain_sum: {max_terms: 3}}."""
        form: Literal["tagged", "bare"] = "tagged"
        """Where the answer is asked for: between <answer> tags, or as the whole reply."""
        prompt: Annotated[str, Field(min_length=1, max_length=10_000)] = "{question}{instruction}"
        """The question; `{question}` stands for the task's and `{instruction}` for the sentence on the form."""
        judging_seconds: Annotated[float, Field(gt=0, le=3600)] = 5.0
        """Seconds for a scorer and one reply, at most hardware.deadline; a reply that takes longer is wrong, if the
        task's own answer does not take as long."""

        @model_validator(mode="after")
        def _fits(self) -> Reasoning.Config:
            for name in self.tasks:
                if name in UNUSABLE:
                    raise ValueError(f"the task {name} cannot be used: {UNUSABLE[name]}")
            for name in self.settings:
                if name not in self.tasks:
                    raise ValueError(f"settings names {name}, which is not among tasks")
                for key in ("seed", "size"):
                    if key in self.settings[name]:
                        raise ValueError(f"settings.{name}.{key} is decided by the split")
            if "{question}" not in self.prompt:
                raise ValueError("prompt must contain {question}")
            return self

        @property
        def needed_extras(self) -> tuple[str, ...]:
            """See Strict."""
            return ("reasoning",)

    components: ClassVar[dict[str, float]] = {"score": 1.0, "format": 0.1, "exact": 0.0}
    single_reply: ClassVar[bool] = True
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if importlib.util.find_spec("reasoning_gym") is None:
            raise MissingExtra("the environment reasoning", "reasoning")

    @property
    def judging_seconds(self) -> float:
        """For the scorers, which may parse for ever."""
        return self.config.judging_seconds

    def _check(self) -> None:
        """Not done when an instance is made: to import reasoning-gym takes seconds."""
        known = _names()
        for name in self.config.tasks:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise UserError(
                    f"reasoning-gym has no task {name!r}"
                    + (f"; did you mean {near[0]}?" if near else f"; it has {', '.join(sorted(known))}")
                )
            self._dataset(name, 0)

    def size(self, split: Split) -> None:
        """There is no end of questions. Raises UserError for names or parameters that reasoning-gym does not know."""
        self._check()

    def task(self, split: Split, index: int) -> Task:
        """Question number `index` of the split. Raises ValueError for a negative index, UserError for a task with too
        few questions to make three splits of."""
        if index < 0:
            raise ValueError(f"{split} has no task {index}")
        name = self._drawn(split, index)
        block = index // TOGETHER * len(_SPLITS) + _SPLITS.index(split)
        first = index % TOGETHER * ATTEMPTS
        for place in range(first, first + ATTEMPTS):
            entry = self._entry(name, block, place)
            if split_of(entry["question"]) == split:
                data = {"task": name, "block": block, "place": place, "question": entry["question"]}
                return Task(
                    f"{split}/{index}", self.config.label, split, index, data | {"answer": str(entry["answer"])}
                )
        raise UserError(f"the task {name} has too few questions to make a {split} split of")

    def open(self, task: Task, seed: int) -> SingleReply:
        """Ask; nothing depends on the seed. Raises SessionFailure if the task is not what its seed gives."""
        name, block, place = task.data["task"], task.data["block"], task.data["place"]
        entry = self._entry(name, block, place)
        if entry["question"] != task.data["question"]:
            raise SessionFailure(f"the task {name} gives another question for the same seed")
        question = self.config.prompt.replace("{instruction}", _INSTRUCTIONS[self.config.form])
        question = question.replace("{question}", entry["question"])
        dataset = self._dataset(name, block)
        return SingleReply(question, lambda reply: (self._rewards(name, dataset, entry, reply), {}))

    def oracle(self, task: Task) -> str:
        """The task's own answer."""
        answer = str(task.data["answer"])
        return f"<answer>{answer}</answer>" if self.config.form == "tagged" else answer

    def canonical(self, task: Task) -> str:
        """The question without case and blanks."""
        return canonical_question(task.data["question"])

    def part(self, task: Task) -> str:
        """The task of the mixture."""
        return str(task.data["task"]) if len(self.config.tasks) > 1 else ""

    def _rewards(self, name: str, dataset: Any, entry: Mapping[str, Any], reply: Reply) -> Mapping[str, float]:
        text = reply.message.content
        tagged = extract(text, "tagged", longest=LONGEST)
        answer = tagged if tagged is not None or self.config.form == "tagged" else text.strip()
        if not answer or len(answer) > LONGEST:
            return {"score": 0.0, "format": 0.0, "exact": 0.0}
        score = _score(name, dataset, answer, entry)
        floor = [each for junk in JUNK if (each := _score(name, dataset, junk, entry)) < 1.0]  # at 1, junk is right
        if score <= max(CONSOLATION, *floor):
            score = 0.0
        well = reply.stop != "length" and (self.config.form == "bare") == (tagged is None)
        return {"score": score, "format": float(well), "exact": float(well and score == 1.0)}

    def _drawn(self, split: Split, index: int) -> str:
        """The name that the mixture gives to a place."""
        total = sum(self.config.tasks.values())
        point = int.from_bytes(draw_key("reasoning", split, index)[:7], "little") / 2**56 * total
        names = list(self.config.tasks)
        for name in names:
            point -= self.config.tasks[name]
            if point < 0:
                return name
        return names[-1]  # where rounding left a little over

    def _entry(self, name: str, block: int, place: int) -> dict[str, Any]:
        """A copy: what a scorer does to it, the next session of the same task must not see."""
        return copy.deepcopy(_entry(name, block, self._settings(name), place))

    def _dataset(self, name: str, block: int) -> Any:
        return _dataset(name, block, self._settings(name))

    def _settings(self, name: str) -> Parameters:
        return tuple(sorted((key, _frozen(value)) for key, value in self.config.settings.get(name, {}).items()))


def canonical_question(text: str) -> str:
    """A question without case and blanks."""
    return re.sub(r"\s+", " ", text).strip().lower()


def split_of(question: str) -> Split:
    """The split that a question belongs to, by a hash of its canonical text."""
    number = hashlib.blake2b(canonical_question(question).encode(), digest_size=8).digest()[0] * 5 // 256
    return {0: _SPLITS[1], 1: _SPLITS[2]}.get(number, _SPLITS[0])


def _score(name: str, dataset: Any, answer: str, entry: Mapping[str, Any]) -> float:
    """What the task's scorer pays. Raises SessionFailure for what is no number in [0, 1]."""
    if not harmless(name, answer):
        return 0.0
    try:
        score = dataset.score_answer(answer, entry)
    except Exception:  # a border: scorers raise whatever their parser raises on an answer that they cannot read
        return 0.0
    if isinstance(score, bool):
        score = float(score)
    if not isinstance(score, int | float) or not math.isfinite(score) or not 0 <= score <= 1:
        raise SessionFailure(f"the scorer of {name} gave {score!r}")
    return float(score)


def _frozen(value: Any) -> Any:
    """A hashable copy of a parameter: lists become tuples."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _names() -> set[str]:
    import reasoning_gym  # noqa: F401  (its import fills the table)
    from reasoning_gym.factory import DATASETS

    return set(DATASETS)


@lru_cache(maxsize=1024)
def _entry(name: str, block: int, settings: Parameters, place: int) -> dict[str, Any]:
    """A question, made once for all samples of a step: some take a quarter of a second. Raises UserError."""
    dataset = _dataset(name, block, settings)
    with OwnRandom(integer(2**63, "reasoning", name, block, place)):  # some draw from the global generators too
        entry: dict[str, Any] = dataset[place]
    return entry


@lru_cache(maxsize=256)
def _dataset(name: str, block: int, settings: Parameters) -> Any:
    """Entries of a seed of their own, enough for a block of questions. Raises UserError for wrong parameters."""
    import reasoning_gym

    size = TOGETHER * ATTEMPTS
    try:
        # An entry is drawn from seed + place, so that blocks of this size share no draw.
        return reasoning_gym.create_dataset(name, seed=block * size, size=size, **dict(settings))
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"reasoning-gym refuses the settings of {name}: {error or type(error).__name__}") from error

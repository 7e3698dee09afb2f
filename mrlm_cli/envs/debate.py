"""Debate: each of several agents argues for one option of a question with a known answer, and a judge decides.

    debater_1   Which is larger? (A) 12 + 30 (B) 25 + 14 … You argue for (A).           12 + 30 = 42, so (A).
    debater_2   … You argue for (B). Debater 1, for (A), said: …                       25 + 14 = 39, so (B).
    debater_1   Debater 2, for (B), said: …                                            …
    judge       the question, all that was said, and: which option is right?           (A)

(Irving, Christiano and Amodei 2018, "AI safety via debate", with more than two debaters and options.)
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from mrlm_cli.draws import integer, shuffled
from mrlm_cli.envs.base import Environment, Player
from mrlm_cli.envs.rows import read_rows
from mrlm_cli.envs.splits import HELD_OUT_SHARE, split_classes
from mrlm_cli.errors import UserError
from mrlm_cli.records import Message, Reply, Split, Task, Turn
from mrlm_cli.strict import EnvironmentSettings, Names

JUDGE = "judge"
LETTERS = "ABCDEFGH"
_NUMBER = re.compile(r"(?<![0-9.])[0-9]+(?![0-9]|\.[0-9])")  # ASCII alone: \d would take the digits of every script
_SCORE = re.compile(r"-?[0-9]{1,30}(?:\.[0-9]{1,30})?(?:e[+-]?[0-9]{1,3})?")
_NAMED = re.compile(r"\(([A-H])\)")


class Debate(Environment):
    """Argue for the option that one is given, over several rounds, before a judge who knows or reads.

    Agents: `debater_1` to `debater_N`, who speak in turn, and `judge` where `judge` is agent. Which option a debater
    argues for is drawn for each task; the right one is always argued for.

    `judge: rules` knows the answer: an option stands if one of its debaters gave its evidence (the last number of a
    reply, where the evidence is a number, else somewhere in it). The right option wins if it stands, otherwise the only
    other one that does. `judge: agent` asks the agent `judge`, which the recipe's `agents` may make a frozen model, and
    takes the last option in brackets of its reply. `judge: scores` shows it the case of each option in turn, as if an
    assistant had made it, and takes the option with the highest number (one that it names in brackets instead of a
    number wins at once); the recipe's `agents` may make it one of the rewards: {judge: {type: scorer, reward: NAME}}.
    Nothing that debaters say is read as a verdict.

    Components: `win`, 1 for the verdict's debaters and -1 for the others, 0 for all where there is none; for a judge 1
    if the verdict is right and -1 otherwise. `exact`, 1 for everyone if the verdict is the right answer. `format`, the
    share of a debater's replies that name the option argued for, as in (A); for a judge 1 if the verdict can be read. A
    debater's reply that is cut by the length limit ends the debate: -1 for its speaker, without a verdict.
    Fact: `verdict`, 1 if there was one. Scripted players: `honest`, who shows the evidence and as judge knows the
    answer, and `silent`.
    """

    class Config(EnvironmentSettings):
        """Who debates what."""

        debaters: Annotated[int, Field(ge=2, le=8)] = 2
        """Agents that argue."""
        rounds: Annotated[int, Field(ge=1, le=16)] = 2
        """Replies of each debater. Keep sampling.max_turns at or above it."""
        judge: Literal["rules", "agent", "scores"] = "rules"
        """Who decides: rules that know the answer, an agent of the role `judge`, or its score of each option's case. A
        judge of scores that is no reward needs a reply for each option (sampling.max_turns): 2 for sums, one for each
        debater with a file."""
        low: Annotated[int, Field(ge=0, le=999_999)] = 1
        """Smallest term of the generated sums; not used with a file."""
        high: Annotated[int, Field(ge=0, le=999_999)] = 50
        """Largest term of the generated sums; not used with a file."""
        path: Annotated[str | None, Names("file")] = None
        """A file of questions instead of sums, JSON lines or .parquet (extra `parquet`): rows with `question`,
        `options` (2 to 8 texts), `answer` (one of them, or its index from 0) and perhaps `evidence` (a text for each
        option; without it an option stands if its debaters name it). A tenth each becomes validation and test."""

        @model_validator(mode="after")
        def _fits(self) -> Debate.Config:
            if self.high - self.low < 9:
                raise ValueError("fewer than ten terms leave nothing to hold out; widen low and high")
            return self

    components: ClassVar[dict[str, float]] = {"win": 1.0, "exact": 0.0, "format": 0.1}
    players: ClassVar[tuple[str, ...]] = ("honest", "silent")
    audited: ClassVar[bool] = True
    config: Config

    @classmethod
    def roles(cls, config: Config) -> tuple[str, ...]:
        """The debaters, and the judge if it is one of the agents."""
        judge = () if config.judge == "rules" else (JUDGE,)
        return (*(f"debater_{number}" for number in range(1, config.debaters + 1)), *judge)

    @classmethod
    def replies(cls, config: Any, agent: str) -> tuple[str, int]:
        """A reply of each debater a round; of a judge one, or one for each option that debaters may argue for."""
        if agent != JUDGE:
            return "rounds", config.rounds
        cases = config.debaters if config.path else 2
        return "judge", cases if config.judge == "scores" else 1

    def size(self, split: Split) -> int | None:
        """Questions of the file in the split; sums have no end."""
        return None if self.config.path is None else len(_file(self.config.path)[split])

    def task(self, split: Split, index: int) -> Task:
        """Question number `index` of the split and who argues for what. Raises UserError for a broken file."""
        if self.config.path is None:
            about = _sums(split, index, self.config.low, self.config.high)
        else:
            about = _file(self.config.path)[split][index]
        others = [option for option in range(len(about["options"])) if option != about["answer"]]
        argued = [about["answer"], *shuffled(others, "debate", split, index, "argued")][: self.config.debaters]
        order = shuffled(argued, "debate", split, index, "sides")
        sides = [order[number % len(order)] for number in range(self.config.debaters)]
        return Task(f"{split}/{index}", self.config.label, split, index, {**about, "sides": sides})

    def open(self, task: Task, seed: int) -> DebateSession:
        """A debate; nothing depends on the seed."""
        return DebateSession(self.config, task.data)

    def oracle(self, task: Task) -> str:
        """The right option and its evidence, whoever speaks."""
        return _argument(task.data, task.data["answer"])

    def canonical(self, task: Task) -> str:
        """The question and its options in whatever order, terms of sums too; not who argues for what."""
        return _canonical(task.data["question"], task.data["options"])

    def player(self, name: str, task: Task, agent: str, seed: int) -> Player:
        """One that always says the same."""
        if name == "silent":
            return _Always("")
        if agent == JUDGE:
            return _Always(self.oracle(task))
        return _Always(_argument(task.data, task.data["sides"][int(agent.removeprefix("debater_")) - 1]))


class DebateSession:
    """One debate."""

    def __init__(self, config: Debate.Config, about: Mapping[str, Any]) -> None:
        self._config = config
        self._about = about
        self._sides: list[int] = about["sides"]
        self._said: list[str] = []  # in order: who spoke follows from the place
        self._named = [0] * config.debaters  # replies that named the option argued for
        self._scores: list[float] = []  # of the options argued for, in their order

    def start(self) -> Turn:
        """The question, to the first debater."""
        return self._next()

    def step(self, reply: Reply) -> Turn:
        """The next debater, the judge, or the end."""
        text, place = reply.message.content, len(self._said)
        if place == self._config.debaters * self._config.rounds:
            if self._config.judge == "scores" and not _NAMED.search(text):
                return self._scored(text)
            found = [letter for letter in _NAMED.findall(text) if LETTERS.index(letter) < len(self._about["options"])]
            return self._end(LETTERS.index(found[-1]) if found else None)
        debater = place % self._config.debaters
        self._said.append(text)
        if reply.stop == "length":
            rewards = {_debater(number): self._received(number, 0.0, 0.0) for number in range(self._config.debaters)}
            rewards[_debater(debater)]["win"] = -1.0
            return Turn(agent=_debater(debater), rewards=rewards, done=True, facts={"verdict": 0.0})
        self._named[debater] += _letter(self._sides[debater]) in text
        if len(self._said) < self._config.debaters * self._config.rounds or self._config.judge != "rules":
            return self._next()
        return self._end(self._by_rules())

    def close(self) -> None:
        """Nothing is held."""

    def _next(self) -> Turn:
        place, count = len(self._said), self._config.debaters
        question = _asked(self._about)
        if place == count * self._config.rounds and self._config.judge == "scores":
            return self._case()
        if place == count * self._config.rounds:
            told = (
                f"{question}\n{self._heard(0)}Which option is right? Answer with its letter in brackets, such as (A)."
            )
            return Turn((Message("user", told),), JUDGE)
        debater = place % count
        if place < count:
            side = _letter(self._sides[debater])
            told = f"{question}\nYou are debater {debater + 1} and argue for {side}. Show why, and write {side}.\n"
            return Turn((Message("user", told + self._heard(0)),), _debater(debater))
        return Turn((Message("user", self._heard(place - count + 1)),), _debater(debater))

    def _heard(self, begin: int) -> str:
        """What was said from reply number `begin` on, a line for each: a reply cannot make up another's."""
        count = self._config.debaters
        return "".join(
            f"Debater {place % count + 1}, for {_letter(self._sides[place % count])}, said: "
            f"{' '.join(self._said[place].splitlines())}\n"
            for place in range(begin, len(self._said))
        )

    def _case(self) -> Turn:
        """One option's case, for the judge to score."""
        option = sorted(set(self._sides))[len(self._scores)]
        count = self._config.debaters
        case = "\n".join(text for place, text in enumerate(self._said) if self._sides[place % count] == option)
        return Turn((Message("user", _asked(self._about)), Message("assistant", case)), JUDGE)

    def _scored(self, text: str) -> Turn:
        """The next case, or the verdict for the only best one; a reply that is no number ends without a verdict."""
        value = float(text) if _SCORE.fullmatch(text.strip()) else math.nan
        if not math.isfinite(value):
            return self._end(None)
        self._scores.append(value)
        options = sorted(set(self._sides))
        if len(self._scores) < len(options):
            return self._case()
        best = max(self._scores)
        return self._end(options[self._scores.index(best)] if self._scores.count(best) == 1 else None)

    def _by_rules(self) -> int | None:
        stands = {
            side
            for place, text in enumerate(self._said)
            if _shows(text, self._about["evidence"][side := self._sides[place % self._config.debaters]])
        }
        if self._about["answer"] in stands:
            return int(self._about["answer"])
        return stands.pop() if len(stands) == 1 else None

    def _received(self, debater: int, win: float, exact: float) -> dict[str, float]:
        return {"win": win, "exact": exact, "format": self._named[debater] / self._config.rounds}

    def _end(self, verdict: int | None) -> Turn:
        right = float(verdict == self._about["answer"])
        decided = verdict in self._sides
        rewards = {
            _debater(number): self._received(number, (2.0 * (side == verdict) - 1.0) * decided, right)
            for number, side in enumerate(self._sides)
        }
        if self._config.judge != "rules":
            rewards[JUDGE] = {"win": 2 * right - 1, "exact": right, "format": float(verdict is not None)}
        facts = {"verdict": float(verdict is not None)}
        return Turn(agent=_debater(0), rewards=rewards, done=True, facts=facts)


class _Always:
    """Says the same whatever it hears."""

    def __init__(self, text: str) -> None:
        self._text = text

    def reply(self, view: Sequence[Message]) -> str:
        """What it always says."""
        return self._text


def _debater(number: int) -> str:
    return f"debater_{number + 1}"


def _letter(option: int) -> str:
    return f"({LETTERS[option]})"


def _argument(about: Mapping[str, Any], option: int) -> str:
    return f"{about['options'][option]}: {about['evidence'][option]}, so {_letter(option)}"


def _asked(about: Mapping[str, Any]) -> str:
    options = " ".join(f"{_letter(number)} {text}" for number, text in enumerate(about["options"]))
    return f"{about['question']} {options}"


def _shows(text: str, evidence: str) -> bool:
    """Whether a reply gives the evidence; of numbers only the last counts, or naming them all would do."""
    if not _NUMBER.fullmatch(evidence):
        return evidence.lower() in text.lower()
    found = _NUMBER.findall(text)
    return bool(found) and found[-1] == evidence


def _canonical(question: str, options: Sequence[str]) -> str:
    return " | ".join([question, *sorted(" + ".join(sorted(option.split(" + "))) for option in options)])


def _sums(split: Split, index: int, low: int, high: int) -> dict[str, Any]:
    """Which of two sums is larger: the first drawn one of the split's share of all such questions, by a hash."""
    attempt = 0
    while True:
        terms = [low + integer(high - low + 1, "debate", split, index, attempt, place) for place in range(4)]
        attempt += 1
        values = [terms[0] + terms[1], terms[2] + terms[3]]
        options = [f"{terms[0]} + {terms[1]}", f"{terms[2]} + {terms[3]}"]
        if values[0] != values[1] and _share(_canonical("", options)) == split:
            return {
                "question": "Which is larger?",
                "options": options,
                "answer": values.index(max(values)),
                "evidence": [str(value) for value in values],
            }


def _share(canonical: str) -> Split:
    number = int.from_bytes(hashlib.blake2b(canonical.encode(), digest_size=8).digest(), "little") / 2**64
    if number < HELD_OUT_SHARE:
        return "validation"
    return "test" if number < 2 * HELD_OUT_SHARE else "train"


@cache
def _file(path: str) -> dict[Split, list[dict[str, Any]]]:
    """The questions of a file by split; equal ones, whatever the order of their options, are kept once."""
    found: dict[str, dict[str, Any]] = {}
    for place, row in read_rows(Path(path).expanduser()):
        question = _question(place, row)
        found.setdefault(_canonical(question["question"], question["options"]), question)
    if len(found) < 3:
        raise UserError(f"{path} holds {len(found)} questions; expected at least 3, one for each split")
    classes = list(found)
    return {split: [found[classes[i]] for i in chosen] for split, chosen in split_classes(classes).items()}


def _question(place: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as task data. Raises UserError that names the place."""
    question, options, answer = row.get("question"), row.get("options"), row.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{place} has no text called question")
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS) or not _distinct(options):
        raise UserError(f"{place}: options must be a list of 2 to {len(LETTERS)} distinct texts")
    number = options.index(answer) if answer in options else answer
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(options):
        raise UserError(f"{place}: answer must be one of the options, or its index from 0; it is {answer!r:.80}")
    evidence = row.get("evidence", [_letter(option) for option in range(len(options))])
    if (
        not isinstance(evidence, list)
        or len(evidence) != len(options)
        or not all(isinstance(text, str) and text.strip() for text in evidence)
    ):
        raise UserError(f"{place}: evidence must be a list of one text for each option")
    return {"question": question, "options": options, "answer": number, "evidence": evidence}


def _distinct(options: Sequence[Any]) -> bool:
    return all(isinstance(text, str) and text.strip() for text in options) and len(set(options)) == len(options)

"""Does an environment keep its word? For the built-in ones and for yours:

    def test_my_environment():
        assert problems(MyEnvironment(MyEnvironment.Config(type="./my_env.py:MyEnvironment"))) == []

The environment runs in the calling process, without a deadline.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from mrlm_cli.envs.base import Environment
from mrlm_cli.envs.wire import check_turn, describe_exception, task_from_json, task_to_json, turn_to_json
from mrlm_cli.records import Message, Reply, Split, Task
from mrlm_cli.strict import EnvironmentSettings

SPLITS: tuple[Split, ...] = get_args(Split)
MOST_TURNS = 1000  # after which a session that was always answered counts as endless

HOSTILE = (
    "",
    " ",
    "\n\n",
    "\0",
    "-",
    "NaN",
    "1e999",
    "0x10",
    "٣٤",  # digits that str.isdigit and int() accept
    "²",  # a digit to str.isdigit that int() refuses
    "１６",
    "9" * 5000,  # more digits than int() takes
    "-" * 100_000,
    "1 " * 50_000,
    "😀" * 2000,
    '{"answer": 1}',
    "<|im_end|>",
    "<answer><answer>1</answer></answer>",
    "\\boxed{" * 1000 + "1" + "}" * 1000,
    "<think><answer></think>" * 5000,
    "\u202e16",
)
"""Replies that no environment may fall over."""


def problems(environment: Environment, *, tasks: int = 50) -> list[str]:
    """What is wrong with an environment, one sentence each; empty if nothing was found.

    Looks at the first `tasks` tasks of every split: purity, JSON, ids, disjoint splits (by `canonical`), sessions that
    repeat themselves, replies in HOSTILE, and that what `oracle(task)` answers is exactly right, if it is
    known.
    """
    found = [*_declarations(environment)]
    for split in SPLITS:
        try:
            found += _tasks(environment, split, tasks)
        except Exception as error:
            found.append(f"{split}: {describe_exception(error)}")
    if found:
        return found  # sessions of wrong tasks would say the same again
    found += _overlaps(environment, tasks)
    found += _sessions(environment)
    found += _oracle(environment, tasks)
    found += _players(environment)
    return found


def _declarations(environment: Environment) -> Iterator[str]:
    if not issubclass(type(environment).Config, EnvironmentSettings):
        yield "Config must inherit EnvironmentSettings"
    declared = environment.declared(environment.config)
    if not declared:
        yield "components declares no reward"
    if not environment.roles(environment.config):
        yield "agents is empty"
    for name, weight in environment.reward_weights(environment.config).items():
        if name not in declared:
            yield f"rewards names {name!r}, which components does not declare"
        if not math.isfinite(weight):
            yield f"the weight of {name!r} is {weight}"


def _first(environment: Environment, split: Split, tasks: int) -> list[Task]:
    size = environment.size(split)
    return [environment.task(split, index) for index in range(tasks if size is None else min(size, tasks))]


def _tasks(environment: Environment, split: Split, tasks: int) -> Iterator[str]:
    size = environment.size(split)
    if size is not None and size < 1:
        yield f"{split}: size is {size}, and must be at least 1"
        return
    seen = _first(environment, split, tasks)
    if len({task.id for task in seen}) != len(seen):
        yield f"{split}: two tasks have the same id"
    again = type(environment)(environment.config)
    for index, task in enumerate(seen):
        where = f"{split} task {index}"
        if (task.env, task.split, task.index) != (environment.config.label, split, index):
            yield f"{where}: env, split or index is {task.env!r}, {task.split!r}, {task.index}"
        if again.task(split, index) != task:
            yield f"{where}: another instance gives another task; it must be a pure function of split and index"
        if task_from_json(json.loads(json.dumps(task_to_json(task), allow_nan=False))) != task:
            yield f"{where}: data does not come back from JSON as it was (tuples, sets and integer keys do not)"


def _overlaps(environment: Environment, tasks: int) -> Iterator[str]:
    if not environment.held_out:
        return
    ids: set[str] = set()
    owner: dict[str, Task] = {}
    for split in SPLITS:
        for task in _first(environment, split, tasks):
            if task.id in ids:
                yield f"{task.id}: two splits have a task of this id"
            ids.add(task.id)
            other = owner.setdefault(environment.canonical(task), task)
            if other.split != split:
                yield f"{task.id} and {other.id} are the same but for a symmetry, in two splits"


def _sessions(environment: Environment) -> Iterator[str]:
    task = environment.task("train", 0)
    for content in HOSTILE:
        for stop in ("end", "length"):
            reply = Reply(Message("assistant", content), stop)
            name = f"the reply {content[:20]!r} ({stop})"
            try:
                first, second = (_play(environment, task, reply) for _ in range(2))
            except Exception as error:
                yield f"{name}: {describe_exception(error)}"
                continue
            if first != second:
                yield f"{name}: two sessions of one task and seed differ"
            if len(first) > MOST_TURNS:
                yield f"{name}: not done after {MOST_TURNS} turns"
                return  # the other replies would take as long


def _play(environment: Environment, task: Task, reply: Reply) -> list[dict[str, Any]]:
    """The turns of a session in which everyone always says the same."""
    session = environment.open(task, 0)
    try:
        turns = [check_turn(session.start(), environment)]
        while not turns[-1].done and len(turns) <= MOST_TURNS:
            turns.append(check_turn(session.step(reply), environment))
    finally:
        session.close()
    return [turn_to_json(turn) for turn in turns]


def _oracle(environment: Environment, tasks: int) -> Iterator[str]:
    if "exact" not in environment.declared(environment.config):
        return
    for split in SPLITS:
        for task in _first(environment, split, tasks):
            try:
                answer = environment.oracle(task)
                exact = 1.0 if answer is None else _exact(environment, task, answer)
            except Exception as error:
                yield f"{task.id}: the oracle's answer fails: {describe_exception(error)}"
                continue
            if exact != 1.0:
                yield f"{task.id}: the oracle's answer has exact = {exact}"


def _exact(environment: Environment, task: Task, answer: str | Sequence[str]) -> float:
    """Sum of `exact` over a session in which every agent gives the replies in order, the last of them again if needed;
    of several agents the least."""
    replies = [answer] if isinstance(answer, str) else answer
    session = environment.open(task, 0)
    totals: dict[str, float] = {}
    spoken: dict[str, int] = {}
    try:
        turn = check_turn(session.start(), environment)
        while not turn.done and sum(spoken.values()) < MOST_TURNS:
            place = spoken[turn.agent] = spoken.get(turn.agent, 0) + 1
            text = replies[min(place, len(replies)) - 1]
            turn = check_turn(session.step(Reply(Message("assistant", text), "end")), environment)
            for agent, components in turn.rewards.items():
                totals[agent] = totals.get(agent, 0.0) + components.get("exact", 0.0)
    finally:
        session.close()
    if max(spoken.values(), default=0) < len(replies):
        raise ValueError("the session is over before the oracle's last reply")
    return min(totals.values(), default=0.0)


def _players(environment: Environment) -> Iterator[str]:
    roles = environment.roles(environment.config)
    for name in environment.players:
        task = environment.task("train", 0)
        try:
            players = {role: environment.player(name, task, role, 0) for role in roles}
            session = environment.open(task, 0)
            views: dict[str, list[Message]] = {role: [] for role in roles}
            turns = 0
            try:
                turn = check_turn(session.start(), environment)
                while not turn.done and turns <= MOST_TURNS:
                    view = views[turn.agent]
                    view += turn.messages
                    view.append(Message("assistant", players[turn.agent].reply(tuple(view))))
                    turn = check_turn(session.step(Reply(view[-1], "end")), environment)
                    turns += 1
            finally:
                session.close()
        except Exception as error:
            yield f"player {name}: {describe_exception(error)}"
            continue
        if turns > MOST_TURNS:
            yield f"player {name}: not done after {MOST_TURNS} turns"

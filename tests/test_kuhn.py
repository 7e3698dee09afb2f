"""Kuhn poker: the game, its exact numbers against brute force, and what an evaluation reads off the policy."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mrlm_cli.draws import uniforms
from mrlm_cli.envs.base import Question
from mrlm_cli.envs.conformance import problems
from mrlm_cli.envs.kuhn import (
    DEALS,
    INFORMATION_SETS,
    VALUE,
    Kuhn,
    best_response,
    equilibrium,
    exploitability,
    payoff,
    value,
)
from mrlm_cli.errors import UserError
from mrlm_cli.records import Message, Reply
from mrlm_cli.training.questions import probabilities
from mrlm_cli.training.summary import episode_metrics
from tests.kit import tiny, trainer
from tests.test_agents import KUHN

TABLES = st.lists(st.floats(0, 1), min_size=12, max_size=12).map(
    lambda numbers: dict(zip(INFORMATION_SETS, numbers, strict=True))
)


def kuhn(form: str = "symbols") -> Kuhn:
    return Kuhn(Kuhn.Config(type="kuhn", form=form))  # type: ignore[arg-type]


def brute_value(first: Mapping[str, float], second: Mapping[str, float]) -> float:
    """All ten plays of all six deals, each with its probability."""
    total = 0.0
    for a, b in DEALS:
        up = 1 if "JQK".index(a) > "JQK".index(b) else -1
        for play, chips in (("pp", up), ("pbp", -1), ("pbb", 2 * up), ("bp", 1), ("bb", 2 * up)):
            chance = 1.0
            for number, action in enumerate(play):
                bets = first[a + play[:number]] if number % 2 == 0 else second[b + play[:number]]
                chance *= bets if action == "b" else 1 - bets
            total += chance * chips / 6
    return total


def brute_best(table: Mapping[str, float], seat: int) -> float:
    """The best of all 64 pure strategies of a seat."""
    own = [key for key in INFORMATION_SETS if len(key[1:]) % 2 == seat]
    assert len(own) == 6
    strategies = [dict(zip(own, bits, strict=True)) for bits in product((0.0, 1.0), repeat=6)]
    if seat == 0:
        return max(brute_value(each, table) for each in strategies)
    return max(-brute_value(table, each) for each in strategies)


@settings(max_examples=60, deadline=None)
@given(TABLES)
def test_best_responses_and_values_are_those_of_brute_force(table: dict[str, float]) -> None:
    assert value(table, table) == pytest.approx(brute_value(table, table), abs=1e-12)
    for seat in (0, 1):
        assert best_response(table, seat) == pytest.approx(brute_best(table, seat), abs=1e-12)
    assert exploitability(table) == pytest.approx((brute_best(table, 0) + brute_best(table, 1)) / 2, abs=1e-12)
    assert exploitability(table) >= -1e-12


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.25, 1 / 3])
def test_the_known_equilibria_cannot_be_exploited(alpha: float) -> None:
    table = equilibrium(alpha)
    assert exploitability(table) == pytest.approx(0, abs=1e-12)
    assert value(table, table) == pytest.approx(VALUE) == pytest.approx(-1 / 18)
    assert best_response(table, 0) == pytest.approx(-1 / 18)
    assert best_response(table, 1) == pytest.approx(1 / 18)


def test_known_numbers_of_other_policies() -> None:
    coin = dict.fromkeys(INFORMATION_SETS, 0.5)
    assert exploitability(coin) == pytest.approx(11 / 24)
    assert value(coin, coin) == pytest.approx(1 / 8)
    assert exploitability(dict.fromkeys(INFORMATION_SETS, 0.0)) == pytest.approx(1)  # who never calls loses every ante
    for wrong in (equilibrium(0.4) | {"K": 1.0}, equilibrium(0.2) | {"Jpb": 0.1}, equilibrium(0.2) | {"Qb": 0.5}):
        assert exploitability(wrong) > 1e-3


@pytest.mark.parametrize("form", ["symbols", "words"])
def test_it_keeps_an_environments_word(form: str) -> None:
    assert problems(kuhn(form)) == []


@pytest.mark.parametrize("form", ["symbols", "words"])
def test_every_play_pays_what_the_rules_say(form: str) -> None:
    environment = kuhn(form)
    words = {"p": "pass", "b": "bet"} if form == "words" else {"p": "p", "b": "b"}
    sound = {"J": "pb", "Q": "p", "K": "pb", "Jpb": "p", "Qpb": "pb", "Kpb": "b"}
    sound |= {"Jp": "pb", "Qp": "p", "Kp": "b", "Jb": "p", "Qb": "pb", "Kb": "b"}
    for index, play in product(range(6), ("pp", "pbp", "pbb", "bp", "bb")):
        task = environment.task("test", index)
        cards = task.data["cards"]
        session = environment.open(task, 0)
        turns = [session.start()]
        for action in play:
            turns.append(session.step(Reply(Message("assistant", words[action]), "end")))
        assert [turn.agent for turn in turns[:-1]] == ["first", "second", "first"][: len(play)]
        assert [turn.done for turn in turns] == [False] * len(play) + [True]
        won = payoff((cards[0], cards[1]), play)
        assert turns[-1].rewards == {
            seat: {
                "chips": sign * won,
                "exact": float(
                    all(play[n] in sound[cards[n % 2] + play[:n]] for n in range(len(play)) if n % 2 == number)
                ),
            }
            for number, (seat, sign) in enumerate((("first", 1), ("second", -1)))
        }


@pytest.mark.parametrize(("reply", "stop", "penalty"), [("x", "end", 2.0), ("pb", "end", 1.0), ("p", "length", 1.0)])
def test_a_reply_that_is_no_action_forfeits(reply: str, stop: Any, penalty: float) -> None:
    environment = kuhn()
    session = environment.open(environment.task("train", 3), 0)
    session.start()
    session.step(Reply(Message("assistant", "b"), "end"))
    turn = session.step(Reply(Message("assistant", reply), stop))
    assert turn.done
    assert turn.rewards["second"] == {"chips": -1.0, "exact": 0.0, "invalid": penalty}
    assert turn.rewards["first"]["chips"] == 1.0


@pytest.mark.parametrize("form", ["symbols", "words"])
def test_questions_are_what_the_agents_see(form: str) -> None:
    """The view of a question is word for word the view in a session, so that its answer is the policy's there."""
    environment = kuhn(form)
    asked = {question.view: [] for question in environment.questions()}
    assert len(asked) == 12
    for question in environment.questions():
        asked[question.view].append(question.reply)
    pass_, bet = asked[next(iter(asked))]
    assert all(replies == [pass_, bet] for replies in asked.values())
    seen = set()
    for index, play in product(range(6), ("pbp", "bp")):
        session = environment.open(environment.task("test", index), 0)
        views: dict[str, list[Message]] = {"first": [], "second": []}
        turn = session.start()
        for action in play:
            views[turn.agent] += turn.messages
            seen.add(tuple(views[turn.agent]))
            said = Message("assistant", bet if action == "b" else pass_)
            views[turn.agent].append(said)
            turn = session.step(Reply(said, "end"))
    assert seen == set(asked)


def test_findings_are_the_exploitability_of_the_normalised_table() -> None:
    table = {key: uniforms(b"kuhn", number)[0] for number, key in enumerate(INFORMATION_SETS)}
    asked = [share for key in INFORMATION_SETS for share in (0.5 * (1 - table[key]), 0.5 * table[key])]
    found = kuhn().findings(asked)
    assert found["exploitability"] == pytest.approx(exploitability(table))
    assert found["value"] == pytest.approx(value(table, table))
    assert found["legal"] == pytest.approx(0.5)
    assert math.isfinite(kuhn().findings([0.0] * 24)["exploitability"])


def test_a_players_frequencies_are_the_equilibriums() -> None:
    environment = kuhn("words")
    task = environment.task("train", 0)  # the jack against the queen
    view = environment.open(task, 0).start().messages
    bets = [environment.player("equilibrium", task, "first", seed).reply(view) == "bet" for seed in range(900)]
    assert sum(bets) / 900 == pytest.approx(1 / 3, abs=0.05)
    fold = (
        *view,
        Message("assistant", "pass"),
        Message("user", "Your opponent bet. Answer pass (to fold) or bet (to call)."),
    )
    assert {environment.player("equilibrium", task, "first", seed).reply(fold) for seed in range(50)} == {"pass"}


def test_the_probability_of_a_reply_is_how_often_it_is_drawn(tmp_path: Path) -> None:
    """The exact answers against frequencies of the engine's own draws; temperature included."""
    recipe = tiny(**{**KUHN, "sampling": {"tasks_per_step": 3000, "max_new_tokens": 2, "temperature": 0.6}})
    with trainer(tmp_path / "run", recipe) as made:
        with torch.no_grad():
            for parameter in made.policy.lm.parameters():
                parameter.mul_(3.0)  # far from uniform
        made.engine.load(made.policy.lm)
        episodes = made.source.episodes(0)
        firsts = [one for one in episodes if one.agent == "first" and one.task.data["cards"][0] == "Q"]
        said = [(one.transcript.views["first"][1].content, one.spans[1].end - one.spans[1].start) for one in firsts]
        exact = probabilities(
            [Question((Message("user", "1Q"),), word) for word in ("p", "b", "2", "")],
            made.policy,
            made.source._rollout._chat,
            temperature=0.6,
            budget=8,
        )
        whole = sum(exact)
    for word, share in zip(("p", "b", "2"), exact, strict=False):
        spread = 4 * math.sqrt(share * (1 - share) / len(said)) + 1e-3
        drawn = sum(text == word and length == 2 for text, length in said) / len(said)
        assert drawn == pytest.approx(share, abs=spread)
    assert 0 < whole < 1


def test_a_question_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with trainer(tmp_path / "run", tiny(**KUHN)) as made:
        chat = made.source._rollout._chat
        for view, reply in ((("p" * 40,), "p"), (("p",), "b" * 40)):
            question = Question(tuple(Message("user", text) for text in view), reply)
            with pytest.raises(UserError, match="context of 32"):
                probabilities([question], made.policy, chat, temperature=1.0, budget=64)


def test_evaluations_report_exploitability_and_each_agent(tmp_path: Path) -> None:
    with trainer(tmp_path / "run", tiny(**KUHN)) as made:
        made.evaluate()
        stored = json.loads((made.run.path / "eval/step-000000.json").read_text())
        means = episode_metrics(made.source.episodes(0), made.environments).means()
    assert set(stored["findings"]) == {"kuhn/exploitability", "kuhn/value", "kuhn/legal"}
    assert 0 < stored["findings"]["kuhn/legal"] < 0.2
    assert {"reward", "chips", "exact", "invalid"} <= set(stored["agents"]["kuhn/first"])
    assert means["reward/kuhn/first/chips"] == -1  # random letters forfeit at once
    assert "reward/kuhn/chips" in means

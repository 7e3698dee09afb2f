"""Games of TextArena: every usable one keeps an environment's word, chance is the session's own, seats are agents."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

pytest.importorskip("textarena", reason="the extra textarena is not installed")

from textarena.envs.registration import ENV_REGISTRY

from mrlm_cli import api
from mrlm_cli.envs import textarena
from mrlm_cli.envs.conformance import SPLITS, problems
from mrlm_cli.envs.global_random import OwnRandom
from mrlm_cli.envs.textarena import UNUSABLE, TextArena
from mrlm_cli.errors import MissingExtra, UserError
from mrlm_cli.records import Message, Reply, Turn

SINGLE = ("GuessTheNumber-v0", "2048-v0", "Mastermind-v0")
DUELS = ("TicTacToe-v0", "KuhnPoker-v0", "PigDice-v0")
# The first two search for a solvable start, a good part of a second or more for each; random moves do not end the last.
LONG = {"RushHour", "Sokoban", "Stratego"}


def make(game: str, players: int = 1, **settings: object) -> TextArena:
    return TextArena(TextArena.Config(type="textarena", game=game, seats=players, settings=settings))  # type: ignore[arg-type]


def say(text: str) -> Reply:
    return Reply(Message("assistant", text), "end")


def played(environment: TextArena, index: int, seed: int = 0) -> list[Turn]:
    """A game in which the scripted player speaks for everyone."""
    task = environment.task("train", index)
    session = environment.open(task, 0)
    players = {role: environment.player("random", task, role, seed) for role in environment.roles(environment.config)}
    views: dict[str, list[Message]] = {role: [] for role in players}
    turns = [session.start()]
    while not turns[-1].done:
        now = turns[-1]
        views[now.agent] += [*now.messages]
        text = players[now.agent].reply(views[now.agent])
        views[now.agent].append(Message("assistant", text))
        turns.append(session.step(say(text)))
    return turns


@pytest.mark.parametrize(("game", "players"), [*((game, 1) for game in SINGLE), *((game, 2) for game in DUELS)])
def test_it_keeps_an_environments_word(game: str, players: int) -> None:
    assert problems(make(game, players), tasks=5) == []


def families() -> dict[str, str]:
    """Folder of a game -> the first id of it."""
    found: dict[str, str] = {}
    for name, spec in ENV_REGISTRY.items():
        found.setdefault(str(spec.entry_point).split(".")[2], name)
    return found


def test_what_is_refused_is_there() -> None:
    assert set(UNUSABLE) <= set(families())


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(families()) - set(UNUSABLE)))
def test_every_game_for_one_or_two_is_usable_or_refused(family: str) -> None:
    game, reasons = families()[family], []
    for players in (1, 2):
        environment = make(game, players)
        try:
            environment.size("train")
        except UserError as error:
            reasons.append(str(error))
            continue
        if family not in LONG:
            assert problems(environment, tasks=1) == []
    assert len(reasons) < 2 or all("layer" in each or "Python" in each for each in reasons), reasons


@pytest.mark.parametrize("game", ["2048-v0", "Blackjack-v0"])
def test_a_game_is_a_function_of_its_seed_whatever_else_draws(game: str) -> None:
    environment = make(game)
    alone = played(environment, 3)
    assert alone != played(environment, 4)
    # Two sessions side by side, and somebody else who draws between their turns.
    tasks = [environment.task("train", index) for index in (3, 4)]
    sessions = [environment.open(task, 0) for task in tasks]
    players = [environment.player("random", task, "policy", 0) for task in tasks]
    views: list[list[Message]] = [[], []]
    turns = [[session.start()] for session in sessions]
    while any(not each[-1].done for each in turns):
        for number, session in enumerate(sessions):
            if turns[number][-1].done:
                continue
            random.random()
            numpy.random.random()
            views[number] += turns[number][-1].messages
            text = players[number].reply(views[number])
            views[number].append(Message("assistant", text))
            turns[number].append(session.step(say(text)))
    assert turns[0] == alone
    assert turns[1] == played(environment, 4)


def test_the_processes_own_draws_are_not_disturbed() -> None:
    random.seed(5)
    numpy.random.seed(5)
    expected = random.random(), numpy.random.random()
    random.seed(5)
    numpy.random.seed(5)
    played(make("2048-v0"), 0)
    assert (random.random(), numpy.random.random()) == expected


def test_own_random_goes_on_where_it_was() -> None:
    one, other, together = OwnRandom(7), OwnRandom(7), []
    for _ in range(3):
        with one:
            together.append((random.random(), numpy.random.random()))
    with other:
        assert [(random.random(), numpy.random.random()) for _ in range(3)] == together
    with OwnRandom(8):
        assert (random.random(), numpy.random.random()) != together[0]


def test_a_game_is_the_same_in_a_process_with_other_hashes(tmp_path: Path) -> None:
    """Games that walk through sets of strings must not depend on Python's hash seed in a worker."""
    script = """
from mrlm_cli.envs.textarena import TextArena
from mrlm_cli.records import Message, Reply
for game, seats in (("2048-v0", 1), ("TruthAndDeception-v0", 2), ("Set-v0", 1)):
    environment = TextArena(TextArena.Config(type="textarena", game=game, seats=seats))
    task = environment.task("train", 1)
    session, player = environment.open(task, 0), environment.player("random", task, "first", 0)
    turn = session.start()
    while not turn.done:
        print(turn)
        turn = session.step(Reply(Message("assistant", player.reply(turn.messages)), "end"))
    print(turn)
"""
    said = []
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[1]), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        )
        said.append(done.stdout)
    assert said[0].count("done=True") == 3
    assert said[0] == said[1]


def test_guessing_right_is_exact_and_wrong_is_told() -> None:
    environment = make("GuessTheNumber-v0", max_number=9)
    session = environment.open(environment.task("train", 0), 0)
    first = session.start()
    assert "between 1 and 9" in first.messages[0].content
    assert first.agent == "policy"
    paid: dict[str, float] = {}
    low, high, moves = 1, 9, 0
    while not paid:
        middle = (low + high) // 2
        turn = session.step(say(str(middle)))  # without brackets: the game's own wrapper adds them
        moves += 1
        if turn.done:
            paid = dict(turn.rewards["policy"])
        elif "lower" in turn.messages[0].content:
            high = middle - 1
        else:
            assert "higher" in turn.messages[0].content
            low = middle + 1
        assert str(middle) not in "".join(message.content for message in turn.messages)  # his own words are not told
    assert paid == {"reward": 1.0, "invalid": 0.0, "exact": 1.0}
    assert turn.facts == {"moves": float(moves)}


def test_illegal_moves_follow_the_games_rules() -> None:
    environment = make("GuessTheNumber-v0")
    session = environment.open(environment.task("train", 0), 0)
    session.start()
    again = session.step(say("[999]"))
    assert not again.done  # one error is allowed
    assert "invalid move" in again.messages[0].content
    turn = session.step(say("[999]"))
    assert turn.done
    assert turn.rewards["policy"] == {"reward": 0.0, "invalid": 1.0, "exact": 0.0}


def test_two_seats_see_their_own_views_and_win_against_each_other() -> None:
    environment = make("TicTacToe-v0", 2)
    session = environment.open(environment.task("train", 0), 0)
    turn, agents = session.start(), []
    for move in ("[0]", "[3]", "[1]", "[4]", "[2]"):
        agents.append(turn.agent)
        text = turn.messages[0].content
        assert text.count("Current Board") == 1
        assert (f"You are Player {0 if turn.agent == 'first' else 1}" in text) == (len(agents) <= 2)
        turn = session.step(say(move))
    assert agents == ["first", "second", "first", "second", "first"]
    assert turn.done
    assert turn.rewards["first"] == {"reward": 1.0, "invalid": 0.0, "exact": 1.0}
    assert turn.rewards["second"] == {"reward": -1.0, "invalid": 0.0, "exact": 0.0}


def test_the_scripted_player_plays_moves_that_he_was_offered() -> None:
    environment = make("TicTacToe-v0", 2)
    ends = [played(environment, 0, seed)[-1].rewards for seed in range(12)]
    assert {each["first"]["reward"] + each["second"]["reward"] for each in ends} == {0.0}
    assert len({json.dumps(each) for each in ends}) > 1
    assert sum(each[role]["invalid"] for each in ends for role in each) < 6


def test_splits_share_no_seed() -> None:
    environment = make("GuessTheNumber-v0")
    seeds = [environment.task(split, index).data["seed"] for split in SPLITS for index in range(9)]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"game": "Wordle-v0"}, "downloads lists of words"),
        ({"game": "Debate-v0", "seats": 2}, "models behind a network"),
        ({"game": "GuessTheNumbr-v0"}, "did you mean GuessTheNumber-v0"),
        ({"game": "TicTacToe-v0"}, "does not start with seats: 1: AssertionError"),
        ({"game": "SpiteAndMalice-v0"}, "it has 2 players"),
        ({"game": "GuessTheNumber-v0", "seats": 2}, "does not start with seats: 2"),
        ({"game": "GuessTheNumber-v0", "settings": {"highest": 3}}, r"TypeError: .*unexpected keyword"),
        *([({"game": "Chess-v0", "seats": 2}, "Python 3.11")] if sys.version_info < (3, 12) else []),
    ],
)
def test_what_cannot_be_played_is_refused_with_the_reason(fields: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        TextArena(TextArena.Config(type="textarena", **fields)).size("train")  # type: ignore[arg-type]


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textarena.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"mrlm\[textarena\]"):
        make("GuessTheNumber-v0")


def test_the_smoke_recipe_trains(tmp_path: Path) -> None:
    """In worker processes, a scripted opponent in the second seat, whose views make no episodes."""
    changes = ["steps=1", "sampling.tasks_per_step=4", "sampling.max_turns=2", "evaluate.tasks=2", "hardware.threads=1"]
    recipe = api.load_recipe("textarena_smoke", changes)
    run = api.train(recipe, run_dir=tmp_path / "run", plain=True)
    (metrics,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert -1 <= metrics["reward/tic_tac_toe/first/reward"] <= 1
    assert "reward/tic_tac_toe/invalid" in metrics
    assert 0 <= metrics["reward/guess/reward"] <= 1
    assert metrics.get("failed_rate", 0.0) == 0

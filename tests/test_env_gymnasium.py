"""Gymnasium: its toy texts and environments of one's own, told, answered, cut and paid."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gymnasium", reason="the extra gymnasium is not installed")

import gymnasium
from gymnasium import spaces

from mrlm_cli import api
from mrlm_cli.envs import gymnasium as adapter
from mrlm_cli.envs.conformance import problems
from mrlm_cli.envs.gymnasium import Gymnasium
from mrlm_cli.errors import MissingExtra, UserError
from mrlm_cli.records import Message, Reply, Turn

GAME = str(Path(__file__).parents[1] / "recipes/my_game.py")
HERE = str(Path(__file__))
LAKE = {"id": "FrozenLake-v1", "success_reward": 1.0}
DRAWN = {**LAKE, "settings": {"render_mode": "ansi", "is_slippery": False}, "actions": ("left", "down", "right", "up")}
COPY = {"path": f"{GAME}:CopyWords", "success_reward": 3.0}
CASES: list[dict[str, Any]] = [
    LAKE,
    {**DRAWN, "mistakes": 2, "prompt": "Reach G."},
    {**LAKE, "observe_path": f"{GAME}:lake", "act_path": f"{GAME}:compass"},
    {**COPY, "settings": {"words": 2, "max_episode_steps": 9}},
    {"id": "Taxi-v4", "observe_path": f"{HERE}:taxi", "success_reward": -9000.0},
    {"id": "CliffWalking-v1", "success_reward": -13.0, "settings": {"max_episode_steps": 30}},
    {"id": "Blackjack-v1", "observe_path": f"{HERE}:cards", "success_reward": 1.0},
]


def taxi(observation: int, environment: Any) -> str:
    row, column, passenger, goal = environment.unwrapped.decode(observation)
    return f"taxi {row},{column}; passenger {passenger}; goal {goal}"


def cards(observation: tuple[int, int, int], environment: Any) -> str:
    return f"You hold {observation[0]}, the dealer shows {observation[1]}."


class Restless(gymnasium.Env):
    """Draws from the global generator, and says in info how it went."""

    observation_space = spaces.Discrete(10)
    action_space = spaces.Discrete(2, start=3)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict[str, Any]]:
        return random.randrange(10), {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        return random.randrange(10), 0.25, action == 4, False, {"won": action == 4}


def anything(reply: str, environment: Any) -> int:
    return 3


class Boxed(gymnasium.Env):
    observation_space = spaces.Box(0, 1, (2,))
    action_space = spaces.Box(0, 1, (2,))


def make(**fields: Any) -> Gymnasium:
    return Gymnasium(Gymnasium.Config(type="gymnasium", **fields))


def say(text: str) -> Reply:
    return Reply(Message("assistant", text), "end")


def play(environment: Gymnasium, *texts: str, index: int = 0) -> list[Turn]:
    session = environment.open(environment.task("train", index), 0)
    turns = [session.start(), *(session.step(say(text)) for text in texts)]
    session.close()
    return turns


@pytest.mark.parametrize("fields", CASES, ids=lambda fields: str(fields.get("id", "own")))
def test_it_keeps_an_environments_word(fields: dict[str, Any]) -> None:
    assert problems(make(**fields), tasks=5) == []


def test_a_lake_is_drawn_walked_and_won() -> None:
    turns = play(make(**DRAWN, prompt="Reach G."), "right", " right\n", "down", "down", "down", "right")
    assert turns[0].messages[0].content == "Reach G.\n[S]FFF\nFHFH\nFFFH\nHFFG"
    assert turns[1].messages[0].content == "  (Right)\nS[F]FF\nFHFH\nFFFH\nHFFG"
    assert [turn.done for turn in turns] == [False] * 6 + [True]
    assert not turns[-1].truncated
    assert turns[-1].rewards["policy"] == {"reward": 1.0, "exact": 1.0}
    fallen = play(make(**DRAWN), "down", "right")[-1]
    assert fallen.done
    assert fallen.rewards["policy"] == {"reward": 0.0, "exact": 0.0}


def test_your_own_functions_tell_and_read() -> None:
    environment = make(
        **LAKE, settings={"is_slippery": False}, observe_path=f"{GAME}:lake", act_path=f"{GAME}:compass", mistakes=1
    )
    turns = play(environment, "East", "nowhere", "south")
    assert turns[0].messages[0].content.startswith("You stand in row 1, column 1;")
    assert turns[1].messages[0].content.startswith("You stand in row 1, column 2;")
    assert turns[2].messages[0].content == "Answer with west, south, east or north."
    assert turns[2].rewards["policy"] == {"invalid": 1.0}
    assert turns[3].done  # the hole in row 2, column 2: the mistake did not move


def test_a_text_game_of_ones_own_pays_each_step() -> None:
    environment = make(**COPY)
    session = environment.open(environment.task("train", 5), 0)
    turn, rewards = session.start(), []
    for wrong in (False, True, False):
        word = turn.messages[0].content
        turn = session.step(say("qqqq" if wrong else word))
        rewards.append(turn.rewards["policy"])
    assert rewards == [{"reward": 1.0}, {"reward": 0.0}, {"reward": 1.0, "exact": 0.0}]
    assert turn.done
    assert not turn.truncated
    wrong = play(environment, "UPPER")[-1]
    assert wrong.done
    assert wrong.rewards["policy"] == {"invalid": 1.0, "exact": 0.0}


def test_what_gymnasium_truncates_is_a_limit_and_shows_what_would_follow() -> None:
    for limited in (
        make(**{**DRAWN, "settings": {**DRAWN["settings"], "max_episode_steps": 2}}),  # type: ignore[dict-item]
        make(path=f"{HERE}:Restless", success_info="won", settings={"max_episode_steps": 2}),
    ):
        actions = ("left", "left") if limited.config.actions else ("3", "3")
        last = play(limited, *actions)[-1]
        assert last.done
        assert last.truncated
        assert last.messages
        assert last.rewards["policy"]["exact"] == 0.0


def test_success_may_be_declared_by_info_and_actions_may_start_anywhere() -> None:
    environment = make(path=f"{HERE}:Restless", success_info="won")
    assert [turn.rewards.get("policy") for turn in play(environment, "3", "4")[1:]] == [
        {"reward": 0.25},
        {"reward": 0.25, "exact": 1.0},
    ]
    assert play(environment, "0")[-1].rewards["policy"] == {"invalid": 1.0, "exact": 0.0}
    summed = make(path=f"{HERE}:Restless", success_reward=0.5)
    assert play(summed, "3", "4")[-1].rewards["policy"]["exact"] == 1.0
    assert play(summed, "4")[-1].rewards["policy"]["exact"] == 0.0


def test_chance_follows_the_tasks_seed_even_from_the_global_generator() -> None:
    environment = make(path=f"{HERE}:Restless", success_info="won")
    shown = [[turn.messages for turn in play(environment, "3", "3", "3", index=index)] for index in (0, 0, 1)]
    random.seed(1)
    assert shown[0] == shown[1] == [turn.messages for turn in play(environment, "3", "3", "3")]
    assert shown[0] != shown[2]
    slippery = make(**LAKE)
    ends = {tuple(turn.messages for turn in play(slippery, "2", index=index)) for index in range(12)}
    assert len(ends) > 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"id": "FrozenLak-v1", "success_reward": 1.0}, "cannot make FrozenLak-v1"),
        ({**LAKE, "settings": {"deep": True}}, "cannot make FrozenLake-v1"),
        ({**LAKE, "actions": ("left",)}, "has 4 actions; actions names 1"),
        ({**COPY, "actions": ("left",)}, "actions is for a Discrete space"),
        ({"path": f"{HERE}:Boxed", "success_reward": 1.0}, "give observe_path"),
        ({"path": f"{HERE}:Boxed", "success_reward": 1.0, "observe_path": f"{HERE}:taxi"}, "give act_path"),
        (
            {"path": f"{HERE}:say", "settings": {"text": ""}, "success_reward": 1.0},
            "gives a Reply, not a",
        ),
    ],
)
def test_what_cannot_be_told_or_answered_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make(**fields).size("train")


@pytest.mark.parametrize(
    "fields",
    [
        {"success_reward": 1.0},
        {**LAKE, "path": f"{GAME}:CopyWords"},
        {"id": "FrozenLake-v1"},
        {**LAKE, "success_info": "won"},
        {**DRAWN, "act_path": f"{GAME}:compass"},
        {**LAKE, "actions": ("a", "a", "b", "c")},
    ],
)
def test_settings_that_contradict_each_other_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"give either|no effect|must differ"):
        make(**fields)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"mrlm\[gymnasium\]"):
        make(**LAKE)


def test_the_smoke_recipe_trains(tmp_path: Path) -> None:
    recipe = api.load_recipe("gymnasium_smoke", ["steps=1", "hardware.threads=1"])
    run = api.train(recipe, run_dir=tmp_path / "run", plain=True)
    (metrics,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {f"reward/{name}/invalid" for name in ("drawn_lake", "told_lake", "copy")} <= set(metrics)
    assert metrics.get("failed_rate", 0.0) == 0


def last_value(policy: Any, tokens: tuple[int, ...]) -> float:
    """V of all tokens of one episode, by itself."""
    import torch

    given, none = torch.tensor([tokens]), torch.zeros(1, len(tokens), dtype=torch.bool)
    out = policy(given, torch.tensor([len(tokens)]), none, temperature=1.0, entropy=False)
    return float(out.final_values.detach())


@pytest.mark.parametrize("truncation", ["terminal", "bootstrap"])
def test_what_is_truncated_is_bootstrapped_as_the_house_does(truncation: str, tmp_path: Path) -> None:
    """The value after the limit is asked for at the next decision, after the observation that would have been next, and
    is what the last action's return goes on with; a limit that is part of the task ends there."""
    import torch  # these not above: worker processes load this file for its environment

    from mrlm_cli.training.annotate import annotate
    from mrlm_cli.training.collate import collate
    from mrlm_cli.training.loop import Progress
    from tests.kit import tiny, trainer

    fields = {"path": f"{HERE}:Restless", "act_path": f"{HERE}:anything", "success_info": "won"}
    recipe = tiny(
        environments=[{"type": "gymnasium", **fields, "settings": {"max_episode_steps": 2}}],
        algorithm={"type": "ppo", "truncation": truncation, "gamma": 0.9, "gae_lambda": 1.0},
        sampling={"tasks_per_step": 2, "max_new_tokens": 24, "max_turns": 5, "stop": list("0123456789")},
        model={"context": 256},
    )
    with trainer(tmp_path / "run", recipe) as made:
        episodes = made.source.episodes(0)
        batch = collate(episodes, "cpu")
        assert batch is not None
        assert batch.truncated.all()
        torch.manual_seed(0)
        for parameter in made.policy.value.parameters():
            torch.nn.init.normal_(parameter)
        batch, _ = annotate(
            batch, made.policy, None, made.needs, temperature=1.0, budget=512, phase=lambda name, done, total: None
        )
        batch, _ = made.algorithm.credit(batch, Progress(0, 1))
        values = [last_value(made.policy, one.tokens) for one in episodes]
    for row, one in enumerate(episodes):
        spoken = [span for span in one.spans if span.kind == "chosen"]
        assert (one.stop, len(spoken)) == ("turns", 2)
        assert len(one.transcript.views["policy"]) == 5  # three observations, two replies
        assert one.rewards[spoken[0].end - 1] == one.rewards[spoken[1].end - 1] == 0.25
        after = [span.kind for span in one.spans if span.start >= spoken[1].end]
        assert ("observation" in after) == (truncation == "bootstrap")
        assert abs(values[row]) > 0.01
        expected = values[row] if truncation == "bootstrap" else 0.0
        for place in reversed([place for span in spoken for place in range(span.start, span.end)]):
            expected = one.rewards[place] + 0.9 * expected
            assert float(batch.returns[row, place]) == pytest.approx(expected, abs=1e-5)

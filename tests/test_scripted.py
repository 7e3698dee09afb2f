"""Scripted policies test environments: the oracle is exact, chance is at its level; and a person can be the policy."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from mrlm_cli import api, registry
from mrlm_cli.cli.app import main
from mrlm_cli.envs.host import Host, NoJournal
from mrlm_cli.envs.scripted import script
from mrlm_cli.errors import MissingExtra, UnknownName, UserError
from mrlm_cli.recipe.sections import Evaluate
from mrlm_cli.training.evaluate import evaluate
from mrlm_cli.training.scripted import ScriptedRollout

# name -> (settings, the level of chance of `exact` for right answers to other tasks: from, to)
ENVIRONMENTS = {
    "sort_digits": ({"digits": 4}, 0.0, 0.05),
    "arithmetic": ({}, 0.0, 0.1),
    "guess": ({"low": 1, "high": 8, "guesses": 2}, 0.05, 0.5),  # 1 − (7/8)² = 0.23
    "sentiment": ({}, 1.0, 1.0),  # one right answer for all
    "math": ({"levels": [3]}, 0.0, 0.1),
    "reasoning": ({"tasks": {"circuit_logic": 1.0}}, 0.3, 0.8),  # 0 or 1
}
OTHERS = sorted(set(registry.BUILT_IN["environments"]) - set(ENVIRONMENTS))


def judged(name, policy, settings, tasks=60):
    found = registry.resolve("environments", name)
    config = found.Config.model_validate_json(json.dumps({"type": name, **settings}))
    with Host([config], folders=[], workers=1, deadline=60.0, journal=NoJournal()) as host:
        rollout = ScriptedRollout(host, script(policy), max_turns=8, phase=lambda *_: None)
        made = evaluate(
            rollout, host.environments, Evaluate(tasks=tasks), split="test", seed=0, step=0, checkpoint=policy
        )
    return made[0]


@pytest.mark.parametrize("name", OTHERS)
def test_the_oracle_of_any_other_built_in_environment_is_exact(name):
    found = registry.resolve("environments", name)
    try:
        made = found(found.Config(type=name))
    except (ValidationError, MissingExtra, UserError) as error:
        pytest.skip(f"not made without settings: {error}")
    if len(made.agents) > 1 or made.oracle(made.task("test", 0)) is None:
        pytest.skip("has no single right reply")
    assert judged(name, "scripted:oracle", {}, tasks=20).components["exact"].mean == 1.0


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_the_oracle_is_exact_and_chance_is_chance(name):
    settings, low, high = ENVIRONMENTS[name]
    right = judged(name, "scripted:oracle", settings)
    assert right.components["exact"].mean == 1.0
    assert right.failed == 0
    by_chance = judged(name, "scripted:random", settings)
    assert low <= by_chance.components["exact"].mean <= high
    again = judged(name, "scripted:random", settings)
    assert replace(again, seconds=0.0) == replace(by_chance, seconds=0.0)


def test_an_environment_without_an_oracle_is_told(tmp_path):
    body = (Path(__file__).parents[1] / "recipes/my_env.py").read_text()
    (tmp_path / "mute.py").write_text(body[: body.index("    def oracle")].replace("self.oracle(task)", '"abcd"'))
    found = registry.resolve("environments", "./mute.py:MyEnvironment", (tmp_path,))
    with Host(
        [found.Config(type="./mute.py:MyEnvironment")],
        folders=[tmp_path],
        workers=1,
        deadline=30.0,
        journal=NoJournal(),
    ) as host:
        task = host.environments["MyEnvironment"].task("test", 0)
        with pytest.raises(UserError, match="does not know the answer"):
            script("scripted:oracle")(host.environments["MyEnvironment"], task, 0, b"k")
        drawn = {script("scripted:random")(host.environments["MyEnvironment"], task, 0, bytes([i])) for i in range(20)}
        assert len(drawn) == 20


def test_unknown_scripts_are_named():
    with pytest.raises(UnknownName, match="scripted:oracle or scripted:random"):
        script("scripted:nothing")
    with pytest.raises(UnknownName):
        script("oracle")


def test_eval_of_a_scripted_policy_on_the_command_line(capsys):
    assert main(["eval", "--policy", "scripted:oracle", "--recipe", "ppo_smoke", "--json", "evaluate.tasks=30"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["components"]["exact"]["mean"] == 1.0
    assert found["checkpoint"] == "scripted:oracle"
    assert main(["eval", "--policy", "scripted:oracle", "--recipe", "rewards_smoke", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: found["components"][name]["mean"] for name in ("exact", "rewards/digits", "rewards/length")} == {
        "exact": 1.0,
        "rewards/digits": 1.0,
        "rewards/length": 1.0,
    }
    variety = found["components"]["rewards/variety"]["mean"]
    assert 0.25 < variety < 1.0
    assert found["reward"]["mean"] == pytest.approx(1.0 + 0.2 + 0.1 + 0.1 * variety)
    assert main(["eval", "--policy", "scripted:oracle"]) == 2
    assert main(["eval", "runs/x", "--policy", "scripted:oracle", "--recipe", "ppo_smoke"]) == 2
    assert main(["eval"]) == 2
    assert "mrlm eval --policy scripted:oracle" in capsys.readouterr().err


def piped(monkeypatch, text, *words):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return main(["play", *words])


def test_a_person_plays_through_a_pipe(monkeypatch, capsys):
    secret = api.registry.resolve("environments", "guess")
    task = secret(secret.Config(type="guess", low=1, high=8)).task("train", 5)
    wrong = 1 if task.data["secret"] != 1 else 2
    code = piped(monkeypatch, f"{wrong}\n{task.data['secret']}\n", "guess", "low=1", "high=8", "--task", "5")
    printed = capsys.readouterr().out
    assert code == 0
    assert "policy earned cost 1" in printed
    assert "win 1, exact 1; reward 0." in printed.replace("cost 1, wasted 0, ", "")
    assert "in 2 turns" in printed


def test_a_reply_of_several_lines_and_the_right_answer(monkeypatch, capsys):
    assert piped(monkeypatch, "first\\\nsecond [bold]\n", "math", "topics=[arithmetic]") == 0
    printed = capsys.readouterr().out
    assert "What is " in printed
    assert "correct 0, format 0, exact 0; reward 0 in 1 turns" in printed
    assert "a right answer: \\boxed{" in printed


def test_a_person_plays_every_agent_of_a_game(monkeypatch, capsys):
    kuhn = registry.resolve("environments", "kuhn")
    made = kuhn(kuhn.Config(type="kuhn"))
    assert piped(monkeypatch, "b\np\nb\np\n", "kuhn") == 0
    printed = capsys.readouterr().out
    for role in made.roles(made.config):
        assert f"{role}: " in printed


@pytest.mark.parametrize(
    ("words", "text", "said"),
    [
        (["guess"], "", "the input ended after 0 replies"),
        (["guess", "hgih=3"], "", "did you mean"),
        (["gess"], "", "did you mean guess"),
        (["guess", "--task", "99999999"], "", "train tasks, from 0 to"),
        (["guess", "--split", "dev"], "", "expected train, validation or test"),
        (["low=1"], "", "mrlm play ENVIRONMENT"),
    ],
)
def test_what_goes_wrong_in_play_is_told(monkeypatch, capsys, words, text, said):
    assert piped(monkeypatch, text, *words) == 2
    assert said in capsys.readouterr().err

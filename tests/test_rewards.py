"""Rewards: what the rules pay, the wall around them, the journal, and their place in a training."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrlm_cli import api, registry
from mrlm_cli.envs import wire
from mrlm_cli.envs.host import NoJournal
from mrlm_cli.errors import MrlmError, RecipeError, ScoringError, UserError
from mrlm_cli.policy.scorer import Scorer
from mrlm_cli.recipe import compose
from mrlm_cli.records import Message, Task, Transcript
from mrlm_cli.rewards.base import Failure, Reward
from mrlm_cli.rewards.conformance import problems
from mrlm_cli.rewards.firewall import Scorers
from mrlm_cli.rewards.wire import transcript_from_json, transcript_to_json
from mrlm_cli.training import loop
from mrlm_cli.training.journal import Journal
from mrlm_cli.training.stopping import Stopper
from tests.kit import tiny, trainer

RECIPES = Path(__file__).parents[1] / "recipes"


def transcript(*replies: str, data=None, agent: str = "policy") -> Transcript:
    view = [Message("user", "question")]
    for text in replies:
        view += [Message("assistant", text), Message("user", "and?")]
    return Transcript(Task("t/0", "e", "train", 0, data or {}), 0, {agent: tuple(view)}, (), {}, "done")


def make(kind: str, **fields):
    found = registry.resolve("rewards", kind)
    return found(found.Config.model_validate_json(json.dumps({"type": kind, **fields})))


def value(kind: str, *replies: str, data=None, **fields) -> float:
    return make(kind, **fields).score([transcript(*replies, data=data)])[0]["policy"]


@pytest.mark.parametrize(
    ("kind", "fields", "replies", "worth"),
    [
        ("regex", {"pattern": "b.d"}, ["abcd", "a b\nd"], 1),
        ("regex", {"pattern": "b.d"}, ["abcd", "no"], 0),
        ("regex", {"pattern": "[0-9]+", "match": "full"}, ["12"], 1),
        ("regex", {"pattern": "[0-9]+", "match": "full"}, ["12."], 0),
        ("regex", {"pattern": "x"}, [], 0),
        ("exact", {}, [" 7\n"], 1),
        ("exact", {"strip": False}, [" 7"], 0),
        ("exact", {"key": "word"}, ["YES"], 0),
        ("exact", {"key": "word", "casefold": True}, ["YES"], 1),
        ("length", {"longest": 4}, ["abcd"], 1),
        ("length", {"longest": 4, "slack": 4}, ["abc", "def"], 0.5),
        ("length", {"longest": 4}, ["abcdef"], 0),
        ("length", {"longest": 9, "shortest": 3, "slack": 2, "unit": "words"}, ["two words"], 0.5),
        ("format", {}, ["<think>a</think>\n<answer>b</answer>"], 1),
        ("format", {}, ["<think>a</think> so <answer>b</answer>"], 0.5),
        ("format", {}, ["<answer>b</answer><think>a</think>"], 0.5),
        ("format", {}, ["<think>a<answer>b</answer></think>"], 0.5),
        ("format", {}, ["<think>a</think>"], 0.25),
        ("format", {}, ["<think></think><think>a</think><answer>b</answer>"], 0.25),
        ("format", {"tags": ["x"]}, [""], 0),
        ("lexicon", {"words": {"good": 1, "bad": -0.5}}, ["Good, bad and fine."], 0.125),
        ("lexicon", {"words": {"good": 1}}, [""], 0),
    ],
)
def test_what_the_rules_pay(kind, fields, replies, worth):
    assert value(kind, *replies, data={"answer": 7, "word": "yes"}, **fields) == pytest.approx(worth)


@given(text=st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_the_rules_stay_in_their_range_whatever_is_said(text):
    for kind, fields in (("regex", {"pattern": "a|b"}), ("length", {"longest": 3, "slack": 5}), ("format", {})):
        assert 0 <= value(kind, text, **fields) <= 1


RULES = {
    "regex": {"pattern": "[0-9]+"},
    "exact": {},
    "length": {"longest": 5, "slack": 5},
    "format": {},
    "lexicon": {},
    "function": {"path": f"{RECIPES}/my_reward.py:variety"},
}


@pytest.mark.parametrize("kind", RULES)
def test_conformance(kind):
    one, two = transcript("7", data={"answer": "7"}), transcript("a <b>", "8", data={"answer": "7"})
    assert problems(make(kind, **RULES[kind]), [one, two]) == []


def test_every_rule_is_tested():
    assert set(RULES) | {"judge", "local_judge", "reward_model"} == set(registry.BUILT_IN["rewards"])


def test_conformance_sees_what_is_wrong():
    class Bad(Reward):
        seen = 0

        def score(self, transcripts):
            text = transcripts[0].views["policy"][-2].content
            if text == "few":
                return []
            if text == "raise":
                raise ValueError("no")
            self.seen += 1
            return [{"policy": {"far": 2.0, "other": self.seen / 1000}.get(text, 0.0)}]

    found = problems(
        Bad(Bad.Config(type="bad")), [transcript(text) for text in ("fine", "few", "raise", "far", "other")]
    )
    assert [text.partition(":")[0] for text in found] == [
        "transcript 1",
        "transcript 2",
        "transcript 3",
        "transcript 4",
        "the values depend on the order of the transcripts",
    ]
    assert "0 outcomes for 1 transcripts" in found[0]


def test_a_lexicon_from_a_file_and_from_vader(tmp_path):
    (tmp_path / "words.txt").write_text("good\t0.5\nfine\n\n")
    assert value("lexicon", "good fine", path=str(tmp_path / "words.txt")) == 0.75
    (tmp_path / "words.txt").write_text("good\t5\n")
    with pytest.raises(UserError, match=r"words\.txt:1: a score is between -1 and 1"):
        value("lexicon", "good", path=str(tmp_path / "words.txt"))
    assert value("lexicon", "wonderful") > 0.4 > -0.4 > value("lexicon", "terrible")


@pytest.mark.parametrize(
    ("kind", "fields", "match"),
    [
        ("regex", {"pattern": "("}, "no regular expression"),
        ("length", {"longest": 1, "shortest": 2}, "above longest"),
        ("format", {"tags": ["a b"]}, "distinct names"),
        ("lexicon", {"words": {"a": 1}, "path": "x"}, "not both"),
        ("lexicon", {"words": {"Good": 1}}, "'Good' would match nothing"),
        ("lexicon", {"words": {"very good": 1}}, "one word in lower case"),
        ("judge", {"url": "ftp://x", "model": "m"}, "pattern"),
        ("judge", {"url": "http://x", "model": "m", "pattern": "[0-9]"}, "needs a group"),
        ("judge", {"url": "http://x", "model": "m", "key_variable": "sk-123"}, "not a key"),
    ],
)
def test_wrong_settings_are_told(kind, fields, match):
    with pytest.raises(ValueError, match=match):
        make(kind, **fields)


def test_transcripts_cross_the_wire():
    one = transcript("a", data={"x": [1, None]})
    assert transcript_from_json(json.loads(json.dumps(transcript_to_json(one)))) == one


# the wall

BODY = """
import os, re, sys, time

class Mute(Exception):
    def __str__(self): raise ValueError("no words")

def by_text(transcript):
    text = transcript.views["policy"][-2].content
    if text == "hang": time.sleep(1000)
    if text == "regex": re.match(r"(a+)+$", "a" * 60 + "b")
    if text == "crash": os._exit(3)
    if text == "exit": sys.exit(0)
    if text == "raise": raise KeyError("x" * 10_000)
    if text == "other": return {"nobody": 1.0}
    if text == "mute": raise Mute
    return {"none": None, "nan": float("nan"), "inf": float("inf"), "big": 1.5, "text": "1", "true": True,
            "list": [1.0], "huge": 10**400, "zero": 0.0, "map": {"policy": 0.5}}.get(text, 1.0)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards")
    (path / "mine.py").write_text(BODY)
    return path


def function(folder, **fields):
    return make("function", path=f"{folder}/mine.py:by_text", low=0.0, high=1.0, max_failed=1.0, **fields).config


def test_nothing_that_a_reward_does_reaches_the_others(folder):
    texts = [
        "fine", "hang", "regex", "crash", "exit", "raise", "other",
        "mute", "huge", "none", "nan", "inf", "big", "text", "true", "list", "zero", "map", "fine",
    ]  # fmt: skip
    begun = time.monotonic()
    with Scorers([function(folder, deadline=2.0)], folders=[folder], workers=2, journal=NoJournal()) as scorers:
        given = scorers.score([(f"s{i}", transcript(text)) for i, text in enumerate(texts)])
    assert time.monotonic() - begun < 30
    found = dict(zip(texts[:-1], (one["function"] for one in given), strict=False))
    assert {text: dict(one) for text, one in found.items() if not isinstance(one, Failure)} == {
        "fine": {"policy": 1.0},
        "zero": {"policy": 0.0},
        "map": {"policy": 0.5},
    }
    said = {text: one.text for text, one in found.items() if isinstance(one, Failure)}
    assert said["hang"] == said["regex"] == "no answer within 2 s"
    assert said["crash"] == "the worker process exited with code 3, twice"
    assert said["exit"].startswith("SystemExit")
    assert said["raise"].startswith("KeyError")
    assert len(said["raise"]) < 600
    assert "'nobody'" in said["other"]
    assert said["none"] == "expected a number, got None"
    assert said["nan"] == "its value is nan"
    assert said["inf"] == said["huge"] == "its value is inf"
    assert said["mute"].startswith("ValueError: no words")
    assert said["big"] == "its value 1.5 is outside 0 to 1 (low and high)"
    assert {text for text in said if said[text].startswith("expected a number")} == {"none", "text", "true", "list"}
    assert given[-1]["function"] == {"policy": 1.0}


def test_too_many_failures_stop_with_the_reason(folder):
    config = function(folder).model_copy(update={"max_failed": 0.25})
    sessions = [(name, transcript("none")) for name in "abcd"]
    with Scorers([config], folders=[folder], workers=1, journal=NoJournal()) as scorers:
        for _ in range(2):
            scorers.score(sessions)  # all of this call failed, but they are few
        with pytest.raises(ScoringError, match=r"reward function failed on 12 of the last 12 sessions.*got None"):
            scorers.score(sessions)


def test_a_failure_is_replayed_from_the_journal_for_the_same_transcript_alone(folder, tmp_path):
    path = tmp_path / "journal.jsonl"
    path.touch()
    hanging = [("a", transcript("hang")), ("b", transcript("fine"))]
    with Scorers([function(folder, deadline=1.0)], folders=[folder], workers=1, journal=Journal(path)) as scorers:
        first = scorers.score(hanging)
    assert [json.loads(line)["session"] for line in path.read_text().splitlines()] == ["a"]
    begun = time.monotonic()
    patient = function(folder, deadline=1000.0)
    with Scorers([patient], folders=[folder], workers=1, journal=Journal(path)) as scorers:
        assert scorers.score(hanging) == first
        assert scorers.score([("a", transcript("fine"))])[0]["function"] == {"policy": 1.0}
    assert time.monotonic() - begun < 30


def test_a_reward_that_cannot_be_made_is_told_at_once(folder):
    config = make("function", path=f"{folder}/mine.py:by_text").config
    missing = config.model_copy(update={"path": "./nowhere.py:f"})
    with pytest.raises(UserError, match=r"no file \./nowhere\.py"):
        Scorers([missing], folders=[folder], workers=1, journal=NoJournal())
    with pytest.raises(UserError, match="has no function 'g'"):
        make("function", path=f"{folder}/mine.py:g")


CLASS = '''
from mrlm_cli.rewards.base import Failure, Reward, RewardSettings

class Pairs(Reward):
    """Values of two transcripts at a time: how many there are in the call."""

    class Config(RewardSettings):
        lie: bool = False

    at_once = 2

    def score(self, transcripts):
        said = [one.views["policy"][-2].content for one in transcripts]
        if "raise" in said:
            raise ValueError("one of them")
        given = [Failure("told so") if text == "fail" else {"policy": len(said) / 2} for text in said]
        return given[:1] if self.config.lie else given
'''


def test_a_class_of_ones_own_that_takes_several_at_once(tmp_path):
    (tmp_path / "pairs.py").write_text(CLASS)
    found = registry.resolve("rewards", "./pairs.py:Pairs", (tmp_path,))
    texts = ["a", "b", "a", "raise", "fail", "a", "last"]
    for lie in (False, True):
        config = found.Config(type="./pairs.py:Pairs", lie=lie, max_failed=1.0)
        with Scorers([config], folders=[tmp_path], workers=2, journal=NoJournal()) as scorers:
            given = [
                one["Pairs"] for one in scorers.score([(f"{i}", transcript(text)) for i, text in enumerate(texts)])
            ]
        if lie:
            assert given[0] == given[1] == Failure("it gave 1 outcomes for 2 transcripts")
            continue
        assert given[0] == given[1] == {"policy": 1.0}
        assert given[2] == given[3]
        assert "ValueError: one of them" in given[2].text
        assert given[4] == Failure("told so")
        assert given[5] == {"policy": 1.0}
        assert given[6] == {"policy": 0.5}


def test_transcripts_that_cannot_be_sent_together_fail(tmp_path, monkeypatch):
    (tmp_path / "pairs.py").write_text(CLASS)
    monkeypatch.setattr(wire, "MAX_FRAME", 2**16)
    config = registry.resolve("rewards", "./pairs.py:Pairs", (tmp_path,)).Config(type="./pairs.py:Pairs", max_failed=1)
    long = transcript("x" * 40_000)
    with Scorers([config], folders=[tmp_path], workers=1, journal=NoJournal()) as scorers:
        given = [one["Pairs"] for one in scorers.score([(f"{i}", long) for i in range(3)])]
    assert [isinstance(one, Failure) and "over the limit" in one.text for one in given] == [True, True, False]


def test_a_transcript_that_cannot_be_sent_fails_alone(folder):
    odd = [transcript("fine", data={"x": {1}}), transcript("a" * 2**20), transcript("fine")]
    with Scorers([function(folder)], folders=[folder], workers=1, journal=NoJournal()) as scorers:
        given = [one["function"] for one in scorers.score([(f"{i}", one) for i, one in enumerate(odd)])]
    assert "set is not JSON serializable" in given[0].text
    assert "too long" in given[1].text
    assert given[2] == {"policy": 1.0}


def test_a_signal_is_heeded_while_a_reward_hangs(folder):
    class Stop(Exception):
        pass

    def check():
        if time.monotonic() > begun + 1.5:
            raise Stop

    begun = time.monotonic()
    with (
        pytest.raises(Stop),
        Scorers([function(folder)], folders=[folder], workers=1, journal=NoJournal(), check=check) as scorers,
    ):
        scorers.score([("a", transcript("regex"))])
    assert time.monotonic() - begun < 5.0


def test_a_trained_reward_model_is_a_reward(tmp_path):
    recipe = api.load_recipe("reward_model_smoke", ["steps=2", "evaluate.every=0", "hardware.threads=1"])
    learnt = api.train(recipe, run_dir=tmp_path / "scores", plain=True)
    sessions = [("a", transcript("012")), ("b", transcript("210")), ("c", transcript("0" * 200)), ("d", transcript())]
    config = make("reward_model", path=str(learnt), max_failed=1.0).config
    with Scorers([config], folders=[], workers=1, journal=NoJournal()) as scorers:
        given = [one["reward_model"] for one in scorers.score(sessions)]
    expected = Scorer(str(learnt)).score([one for _, one in sessions[:2]])
    assert [one["policy"] for one in given[:2]] == pytest.approx(expected, abs=1e-5)
    assert expected[0] != expected[1]
    assert "more than the reward model can see" in given[2].text
    assert given[3] == {}
    with pytest.raises(UserError, match="there is no reward model"):
        make("reward_model", path=str(tmp_path / "nowhere"))


def test_a_reward_that_cannot_be_prepared_stops_the_run(tmp_path):
    (tmp_path / "unready.py").write_text(CLASS + "    def prepare(self):\n        raise RuntimeError('no model')\n")
    found = registry.resolve("rewards", "./unready.py:Pairs", (tmp_path,))
    with (
        Scorers([found.Config(type="./unready.py:Pairs")], folders=[tmp_path], workers=1, journal=NoJournal()) as made,
        pytest.raises(MrlmError, match="cannot start: RuntimeError: no model"),
    ):
        made.score([("a", transcript("a"))])


# in a training


def test_rewards_are_added_by_weight_and_become_metrics(tmp_path):
    rewards = [
        {"type": "regex", "name": "always", "pattern": "^", "weight": 1.0},
        {"type": "length", "longest": 0, "slack": 100, "weight": -0.5},
    ]
    with trainer(tmp_path / "plain", tiny()) as made:
        plain = made.source.episodes(0)
    with trainer(tmp_path / "scored", tiny(rewards=rewards)) as made:
        scored = made.source.episodes(0)
        loop.iteration(made)
        metrics = made.run.metrics()[-1]
    for before, after in zip(plain, scored, strict=True):
        assert before.tokens == after.tokens
        given = {name: worth for _, _, name, worth in after.transcript.rewards if name.startswith("rewards/")}
        length = sum(len(each.content) for each in after.transcript.views["policy"] if each.role == "assistant")
        assert given == {"rewards/always": 1.0, "rewards/length": pytest.approx(1 - length / 100)}
        expected = list(before.rewards)
        expected[after.chosen[-1]] += 1.0 - 0.5 * (1 - length / 100)
        assert after.rewards == pytest.approx(tuple(expected))
    assert metrics["reward/always"] == 1.0
    assert 0.9 < metrics["reward/length"] <= 1.0


def test_sessions_that_a_reward_cannot_score_are_left_out_and_counted(tmp_path):
    (tmp_path / "odd.py").write_text("def odd(transcript):\n    return None if transcript.task.index % 2 else 1.0\n")
    rewards = [{"type": "function", "name": "odd", "path": f"{tmp_path}/odd.py:odd", "max_failed": 0.9}]
    with trainer(tmp_path / "run", tiny(rewards=rewards)) as made:
        episodes = made.source.episodes(0)
        failed = [one for one in episodes if one.stop == "failed"]
        assert {one.task.index % 2 for one in failed} == {1}
        assert {one.failure for one in failed} == {"reward odd: expected a number, got None"}
        loop.iteration(made)
        metrics = made.run.metrics()[-1]
        assert metrics["failed/odd"] + metrics["episodes"] == len(episodes)
        assert metrics["reward/odd"] == 1.0
    strict = [{**rewards[0], "max_failed": 0.0}]
    with trainer(tmp_path / "strict", tiny(rewards=strict)) as made:
        cursor = made.source.state()
        with pytest.raises(ScoringError, match="reward odd failed"):
            loop.run(made, Stopper())
        assert made.source.state() == cursor


def test_a_recipe_names_its_rewards(tmp_path):
    composed = compose.load("rewards_smoke")
    assert [each.label for each in composed.recipe.rewards] == ["digits", "length", "variety"]
    assert composed.recipe.rewards[2].path == f"{RECIPES}/my_reward.py:variety"
    text = (RECIPES / "rewards_smoke.yaml").read_text()
    for wrong, said in (
        (text.replace("slack", "slak"), r"r.yaml:11:\d+ rewards.1.slak: unknown key for type length; did you mean"),
        (text.replace("type: regex", "type: regx"), "no reward is called 'regx'; did you mean regex"),
        (text.replace("name: digits", "name: length"), "a second reward called 'length'"),
        (text.replace('"[0-9]+"', '"("'), "no regular expression"),
        (text.replace("longest: 4", "longest: 4, low: 2"), r"low \(2\) must be below high"),
    ):
        (tmp_path / "r.yaml").write_text(wrong.replace("./my_reward.py", f"{RECIPES}/my_reward.py"))
        with pytest.raises(RecipeError, match=said):
            compose.load(tmp_path / "r.yaml")

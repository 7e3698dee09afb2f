"""Tasks written for verifiers v1: asked, scored by their own rewards and metrics, split by what they ask."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verifiers", reason="the extra verifiers (about 50 packages) is not installed")

from verifiers import v1

from mrlm_cli import api
from mrlm_cli.envs import verifiers as adapter
from mrlm_cli.envs.conformance import problems
from mrlm_cli.envs.verifiers import Verifiers
from mrlm_cli.envs.wire import check_turn
from mrlm_cli.errors import MissingExtra, SessionFailure, UserError
from mrlm_cli.records import Message, Reply, Split, Task

RECIPES = Path(__file__).parents[1] / "recipes"
HERE = str(Path(__file__))
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class Answer(v1.TaskData):
    answer: str


class Plain(v1.Task[Answer]):
    @v1.reward(weight=2.0)
    async def right(self, trace: v1.Trace) -> float:
        return float(trace.last_reply == self.data.answer)

    @v1.reward(weight=0.5)
    async def parts(self, trace: v1.Trace) -> dict[str, float]:
        return {"short": float(len(trace.last_reply) < 4), "cut": float(trace.is_truncated)}

    @v1.metric
    async def turns(self, trace: v1.Trace) -> float:
        return float(trace.num_turns + 10 * len(trace.messages))


class Odd(v1.Task[Answer]):
    @v1.reward
    async def strange(self, trace: v1.Trace) -> Any:
        return {"nan": float("nan"), "1": 1.0}.get(trace.last_reply)


class Boxed(Plain):
    NEEDS_CONTAINER = True


class Prepared(Plain):
    async def setup(self, trace: v1.Trace, runtime: Any) -> None:
        raise AssertionError


class Running(Plain):
    @v1.reward
    async def ran(self, runtime: Any) -> float:
        raise AssertionError


class Silent(v1.Task[Answer]):
    pass


CONVERSATION = [v1.UserMessage(content="Hello."), v1.AssistantMessage(content="Yes?"), v1.UserMessage(content="And 1?")]


def load(kind: str = "Plain", count: int = 30, **fields: Any) -> list[v1.Task]:
    kinds = {"Plain": Plain, "Odd": Odd, "Boxed": Boxed, "Prepared": Prepared, "Running": Running, "Silent": Silent}
    return [
        kinds[kind](Answer(**{"prompt": f"Say {number // 2}.", "answer": str(number // 2), **fields}))
        for number in range(count)
    ]


def talk() -> list[v1.Task]:
    return [*load(), Plain(Answer(prompt=CONVERSATION, system_prompt="Be brief.", answer="1"))]


def nothing() -> list[str]:
    return ["a text"]


def make(path: str = f"{HERE}:load", **fields: Any) -> Verifiers:
    return Verifiers(Verifiers.Config(type="verifiers", path=path, **fields))


def shipped(**fields: Any) -> Verifiers:
    return make(f"{RECIPES}/my_tasks.py:load", success_reward=1.1, **fields)


def tasks(environment: Verifiers) -> list[Task]:
    return [environment.task(split, index) for split in SPLITS for index in range(environment.size(split))]


def answered(environment: Verifiers, task: Task, text: str, stop: Any = "end") -> Any:
    session = environment.open(task, 0)
    session.start()
    turn = session.step(Reply(Message("assistant", text), stop))
    session.close()
    return turn


def test_it_keeps_an_environments_word() -> None:
    assert problems(shipped(), tasks=10) == []
    assert problems(make(scores=("right", "turns")), tasks=10) == []


def test_each_task_is_scored_by_its_own_rewards_and_metrics() -> None:
    environment = shipped(scores=("characters",))
    for task in tasks(environment):
        (message,) = environment.open(task, 0).start().messages
        first, second = message.content.removesuffix("=").split("+")
        right = str(int(first) + int(second))
        turn = answered(environment, task, right)
        assert turn.done
        assert turn.rewards["policy"] == {"reward": 1.1, "exact": 1.0, "characters": len(right)}
        assert turn.facts == {"correct": 1.0, "number": 1.0}
    wrong = answered(environment, environment.task("train", 0), "x")
    assert wrong.rewards["policy"] == {"reward": 0.0, "exact": 0.0, "characters": 1.0}


def test_weights_keyed_scores_and_the_trace_are_the_librarys() -> None:
    environment = make(scores=("right", "turns", "cut"), rewards={"turns": 0.25}, success_reward=2.5)
    task = environment.task("train", 0)
    answer = environment.open(task, 0).start().messages[0].content.removeprefix("Say ").removesuffix(".")
    turn = answered(environment, task, answer)
    assert turn.rewards["policy"] == {"reward": 2.5, "exact": 1.0, "right": 1.0, "turns": 21.0, "cut": 0.0}
    assert turn.facts == {"short": 1.0}
    cut = answered(environment, task, answer, "length")
    assert cut.rewards["policy"] == {"reward": 3.0, "exact": 1.0, "right": 1.0, "turns": 21.0, "cut": 1.0}
    weights = Verifiers.reward_weights(environment.config)
    assert weights == {"reward": 1.0, "exact": 0.0, "right": 0.0, "turns": 0.25, "cut": 0.0}


def test_a_conversation_is_shown_whole() -> None:
    environment = make(f"{HERE}:talk")
    (task,) = [each for each in tasks(environment) if each.data["place"] == 30]
    turn = environment.open(task, 0).start()
    assert [(message.role, message.content) for message in turn.messages] == [
        ("system", "Be brief."),
        ("user", "Hello."),
        ("assistant", "Yes?"),
        ("user", "And 1?"),
    ]
    assert answered(environment, task, "1").rewards["policy"]["reward"] == 2.5


def test_tasks_of_one_prompt_stay_together_and_all_are_used() -> None:
    environment = make()
    homes: dict[str, set[str]] = {}
    for task in tasks(environment):
        homes.setdefault(task.data["prompt"], set()).add(task.split)
    assert all(len(splits) == 1 for splits in homes.values())
    assert sorted(task.data["place"] for task in tasks(environment)) == list(range(30))
    assert [environment.size(split) for split in SPLITS] == [26, 2, 2]
    assert sum(make(limit=12).size(split) for split in SPLITS) == 12


def test_a_score_that_is_none_or_no_number_fails_the_session_and_is_never_wrong() -> None:
    environment = make(settings={"kind": "Odd"})
    task = environment.task("train", 0)
    assert answered(environment, task, "1").rewards["policy"]["reward"] == 1.0
    with pytest.raises(v1.TaskError, match="task Odd scoring"):  # which the host makes a failed session of
        answered(environment, task, "2")
    assert math.isnan(answered(environment, task, "nan").rewards["policy"]["reward"])
    with pytest.raises(SessionFailure, match="reward 'reward' is nan"):
        check_turn(answered(environment, task, "nan"), environment)
    missing = make(scores=("wrong",))
    with pytest.raises(SessionFailure, match="no score 'wrong'; it gave right"):
        answered(missing, missing.task("train", 0), "2")


def test_another_taskset_in_the_worker_is_noticed() -> None:
    task = make().task("train", 0)
    with pytest.raises(SessionFailure, match="another task number"):
        make(settings={"answer": "7"}).open(task, 0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"settings": {"kind": "Boxed"}}, "needs a container"),
        ({"settings": {"image": "python:3.12"}}, "needs a container"),
        ({"settings": {"kind": "Prepared"}}, "prepares or finishes"),
        ({"settings": {"kind": "Running"}}, "ran asks for a runtime"),
        ({"settings": {"kind": "Silent"}}, "has no reward"),
        ({"settings": {"prompt": None}}, "has no prompt"),
        ({"settings": {"prompt": [{"role": "tool", "tool_call_id": "1", "content": "2"}]}}, "results of tools"),
        ({"settings": {"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}}, "more than text"),
        ({"settings": {"count": 4}}, "2 different things"),
        ({"settings": {"colour": "red", "counts": 3, "count": "x"}}, "gives no tasks"),
        ({"path": f"{HERE}:nothing"}, "gives a str, not a verifiers.v1.Task"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make(**fields).size("train")


def test_scores_that_are_there_already_are_refused() -> None:
    with pytest.raises(ValueError, match="a component already"):
        make(scores=("exact",))


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"mrlm\[verifiers\]"):
        make()


def test_the_smoke_recipe_trains(tmp_path: Path) -> None:
    recipe = api.load_recipe("verifiers_smoke", ["steps=1", "hardware.threads=1"])
    run = api.train(recipe, run_dir=tmp_path / "run", plain=True)
    (metrics,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert 0 <= metrics["reward/verifiers/characters"] <= 4
    assert "reward/verifiers/reward" in metrics
    assert metrics.get("failed_rate", 0.0) == 0

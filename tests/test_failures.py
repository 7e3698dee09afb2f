"""What failed too often stops a run, over its last sessions and not over one call; what a reply did is the reply's."""

import json
import os
import time
from pathlib import Path

import pytest

from mrlm_cli.cli.app import main
from mrlm_cli.envs.failures import LEAST, WINDOW, Failures
from mrlm_cli.envs.host import Host, NoJournal
from mrlm_cli.envs.math import Math
from mrlm_cli.errors import RecipeError, ScoringError, SessionFailure, UserError
from mrlm_cli.recipe import compose
from mrlm_cli.records import Message, Reply, Turn
from mrlm_cli.registry import resolve
from mrlm_cli.training.journal import Journal
from mrlm_cli.training.source import take


def test_the_share_is_that_of_the_last_sessions() -> None:
    window = Failures(0.5)
    window.add(["early"] * (LEAST // 2))
    assert window.too_many is None  # so few say little
    window.add(["one more"])
    assert window.too_many == (
        f"failed on {LEAST // 2 + 1} of the last {LEAST // 2 + 1} sessions, more than max_failed (0.5) allows; "
        "the last: one more"
    )
    window.add([None] * LEAST)
    assert window.too_many is None
    window.add([None] * WINDOW + ["late"] * (WINDOW // 2))
    assert window.too_many is None
    window.add(["late"])
    assert f"{WINDOW // 2 + 1} of the last {WINDOW} sessions" in str(window.too_many)
    never, at_once = Failures(1.0), Failures(0.0)
    for each in (never, at_once):
        each.add(["no"] * WINDOW)
    assert never.too_many is None
    assert at_once.too_many is not None


BROKEN = """
from mrlm_cli.envs.base import Environment
from mrlm_cli.envs.single import SingleReply
from mrlm_cli.records import Task

class Broken(Environment):
    components = {"exact": 1.0}
    def size(self, split): return None
    def task(self, split, index): return Task(f"{split}/{index}", self.config.label, split, index, {})
    def open(self, task, seed):
        return SingleReply("?", lambda reply: (1 / 0, {}))
    def close(self):
        raise OSError("nothing to close")
"""


def test_an_environment_that_fails_too_often_stops_the_run(tmp_path: Path, capsys) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    found = resolve("environments", "./broken.py:Broken", (tmp_path,))
    config = found.Config(type="./broken.py:Broken", max_failed=0.25)
    with Host([config], folders=[tmp_path], workers=1, deadline=20.0, journal=NoJournal()) as host:
        for number in range(9):
            name = str(number)
            host.collect(host.open([(name, host.environments["Broken"].task("train", number), 0)]))
            ticket = host.step([(name, Reply(Message("assistant", ""), "end"))])
            if number < 8:
                assert isinstance(host.collect(ticket)[name], SessionFailure)
                continue
            with pytest.raises(ScoringError, match=r"environment Broken failed on 9 of the last 9.*ZeroDivisionError"):
                host.collect(ticket)
    assert "environment Broken: close() raised OSError: nothing to close" in capsys.readouterr().err


ENDLESS = """
from mrlm_cli.envs.base import Environment
from mrlm_cli.records import Message, Task, Turn

class Talk:
    def start(self): return Turn((Message("user", "?"),))
    def step(self, reply): return Turn((Message("user", str(1 / len(reply.message.content))),))
    def close(self): pass

class Endless(Environment):
    components = {"exact": 1.0}
    def size(self, split): return None
    def task(self, split, index): return Task(f"{split}/{index}", self.config.label, split, index, {})
    def open(self, task, seed): return Talk()
"""


def test_sessions_that_were_cut_short_have_not_failed(tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text(ENDLESS)
    config = resolve("environments", "./endless.py:Endless", (tmp_path,)).Config(type="./endless.py:Endless")
    with Host([config], folders=[tmp_path], workers=1, deadline=20.0, journal=NoJournal()) as host:

        def talk(name: str, text: str) -> Turn | SessionFailure:
            host.collect(host.open([(name, host.environments["Endless"].task("train", 0), 0)]))
            answer = host.collect(host.step([(name, Reply(Message("assistant", text), "end"))]))[name]
            host.close([name])
            return answer

        assert all(isinstance(talk(f"good {number}", "yes"), Turn) for number in range(LEAST))
        assert all(isinstance(talk(f"bad {number}", ""), SessionFailure) for number in range(LEAST))
        with pytest.raises(ScoringError, match=f"failed on {LEAST + 1} of the last {2 * LEAST + 1} sessions"):
            talk("one more", "")


def test_a_task_is_made_under_the_deadline(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        BROKEN.replace("def task(self, split, index): return ", "def task(self, split, index):\n        made = ")
        .replace("split, index, {})", "split, index, {'process': __import__('os').getpid()})")
        .replace(
            "    def open", "        while index == 1: pass\n        return {}[2] if index == 2 else made\n    def open"
        )
    )
    found = resolve("environments", "./slow.py:Broken", (tmp_path,))
    settings = [found.Config(type="./slow.py:Broken")]
    with Host(settings, folders=[tmp_path], workers=1, deadline=2.0, journal=NoJournal()) as host:
        environment = host.environments["Broken"]
        assert environment.task("train", 0).data["process"] != os.getpid()
        with pytest.raises(UserError, match=r"environment Broken: task\('train', 1\): no answer within 2 s"):
            take(environment, "Broken", "train", 1)
        with pytest.raises(UserError, match=r"task\('train', 2\): KeyError: 2 \(slow.py:"):
            take(environment, "Broken", "train", 2)
        assert take(environment, "Broken", "train", 3).index == 3


# replies that keep a checker busy


def roots(tmp_path: Path, **fields) -> Math.Config:
    rows = [{"problem": f"Root of {n}?", "answer": f"\\sqrt{{{n}}}"} for n in (2, 3, 5, 6, 7, 10, 11, 13, 14)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Math.Config(type="math", path=str(tmp_path / "a.jsonl"), checker="math_verify", **fields)


def ask(config, journal, texts: list[str], deadline: float = 20.0) -> dict[str, Turn | SessionFailure]:
    """What each reply to a task of its own comes to, asked one after the other."""
    found = {}
    with Host([config], folders=[], workers=1, deadline=deadline, journal=journal) as host:
        for number, text in enumerate(texts):
            task, name = host.environments["math"].task("train", number), f"s{number}"
            assert isinstance(host.collect(host.open([(name, task, 0)]))[name], Turn)
            answer = text.replace("RIGHT", host.environments["math"].oracle(task))
            found |= host.collect(host.step([(name, Reply(Message("assistant", answer), "end"))]))
    return found


def test_a_reply_that_hangs_the_checker_is_wrong_and_stays_so_on_replay(tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    path = tmp_path / "journal.jsonl"
    path.touch()
    config = roots(tmp_path, judging_seconds=2.0)
    texts = ["\\boxed{9^{9^{9^{9}}}}", "RIGHT"]
    found = ask(config, Journal(path), texts)
    wrong, right = found["s0"], found["s1"]
    assert isinstance(wrong, Turn)
    assert wrong.done
    assert wrong.rewards == {"policy": {"correct": 0.0, "format": 0.0, "exact": 0.0}}
    assert wrong.facts == {"hung": 1.0}
    assert isinstance(right, Turn)
    assert right.rewards["policy"]["exact"] == 1.0
    assert right.facts == {"hung": 0.0}
    (row,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert row["failure"].startswith("the reply hangs the checker: no answer within 2 s")
    begun = time.monotonic()
    assert ask(config, Journal(path), texts[:1]) == {"s0": wrong}
    assert time.monotonic() - begun < 15  # remembered, not asked again


STUCK = """
from mrlm_cli.envs.base import Environment
from mrlm_cli.envs.single import SingleReply
from mrlm_cli.records import Task

def check(reply):
    while True:
        pass

class Stuck(Environment):
    components = {"exact": 1.0}
    judging_seconds = 0.5
    def size(self, split): return None
    def task(self, split, index): return Task(f"{split}/{index}", self.config.label, split, index, {})
    def open(self, task, seed): return SingleReply("?", check)
    def oracle(self, task): return "right"
"""


def test_a_checker_that_hangs_on_the_right_answer_too_fails_the_session_and_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text(STUCK)
    config = resolve("environments", "./stuck.py:Stuck", (tmp_path,)).Config(type="./stuck.py:Stuck", max_failed=0.0)
    with Host([config], folders=[tmp_path], workers=1, deadline=1.0, journal=NoJournal()) as host:
        host.collect(host.open([("a", host.environments["Stuck"].task("train", 0), 0)]))
        ticket = host.step([("a", Reply(Message("assistant", "wrong"), "end"))])
        with pytest.raises(ScoringError, match=r"environment Stuck failed on 1 of the last 1.*no answer within 0\.5 s"):
            host.collect(ticket)


# limits of replies


@pytest.mark.parametrize(
    ("environment", "turns", "said"),
    [
        ("{type: code, attempts: 3}", 2, r":5:39 environments.0.attempts: got 3, which takes 3 replies.*max_turns = 2"),
        ("{type: tools, calls: 2}", 2, r"environments.0.calls: got 2, which takes 3 replies"),
        ("{type: tools}", 3, r":5:16 environments.0.calls: got 3, which takes 4 replies"),
        ("{type: debate, rounds: 3}", 2, r"environments.0.rounds: got 3"),
        ("{type: guess, guesses: 7}", 6, r"environments.0.guesses: got 7"),
    ],
)
def test_a_limit_of_replies_that_is_cut_short_is_told(tmp_path: Path, environment: str, turns: int, said: str) -> None:
    path = tmp_path / "r.yaml"
    text = "name: x\nsteps: 1\nmodel: {type: scratch}\nalgorithm: {type: ppo}\n" + f"environments: [{environment}]\n"
    path.write_text(f"{text}sampling: {{max_turns: {turns}}}\n")
    with pytest.raises(RecipeError, match=said):
        compose.load(str(path))
    path.write_text(f"{text}sampling: {{max_turns: {turns + 1}}}\n")
    assert compose.load(str(path)).recipe.sampling.max_turns == turns + 1


# play


def test_play_shows_template_tools_and_whose_turn_it_is(monkeypatch, capsys) -> None:
    import io
    import sys

    def played(text: str, *words: str) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert main(["play", *words]) == 0
        return capsys.readouterr().out

    call = '<tool_call>{"name": "list_notes"}</tool_call>\n'
    printed = played(f"{call}1\n", "tools", "style=template", "kinds=[notes]")
    assert printed.count('[tool] {"name": "read_note", "description"') == 1
    assert "[tool list_notes] " in printed
    printed = played("b\np\n", "kuhn")
    assert "first [user] " in printed
    assert "second [user] " in printed

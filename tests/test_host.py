"""The host of sessions: built-in ones in process, a user's in workers that may print, raise, hang and die."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mrlm_cli.envs import host as host_module
from mrlm_cli.envs.host import Host, NoJournal
from mrlm_cli.envs.sort_digits import SortDigits
from mrlm_cli.errors import DeadlineExceeded, MrlmError, SessionFailure, UserError
from mrlm_cli.records import Message, Reply, Turn
from mrlm_cli.registry import resolve
from mrlm_cli.strict import EnvironmentSettings

USER = '''
import math, os, random, subprocess, sys, tempfile, time
from pathlib import Path
from mrlm_cli.envs.base import Environment
from mrlm_cli.envs.sort_digits import SortDigits
from mrlm_cli.records import Message, Task, Turn

HERE = Path(__file__).parent

class Talk:
    """Counts its steps, and does to its process what it is told."""

    def __init__(self, task, seed):
        self.task, self.seed, self.said = task, seed, []

    def start(self):
        print("a print with no end of line", end="")
        os.system("echo from a child")
        (HERE / "started").open("a").write("x")
        facts = {"pid": os.getpid(), "torch": float("torch" in sys.modules)}
        return Turn((Message("user", f"{self.task.data['word']} {self.seed}"),), facts=facts)

    def step(self, reply):
        self.said.append(reply.message.content)
        return getattr(self, reply.message.content, self.ok)()

    def ok(self, **fields):
        text = f"{len(self.said)} {self.said[-1]} {self.seed}"
        return Turn((Message("user", text),), **{"rewards": {"policy": {"exact": 1}}, **fields})

    def slow(self): time.sleep(0.3); return self.ok()
    def hang(self): time.sleep(1000)
    def die(self): os._exit(3)
    def die_once(self):
        flag = HERE / "died"
        if not flag.exists():
            flag.touch()
            os._exit(3)
        return self.ok()
    def raises(self): raise ValueError("bad luck")
    def long_error(self): raise ValueError("x" * 10**6)
    def exits(self): raise SystemExit(4)
    def memory(self): return bytearray(10**15)
    def recursion(self): return self.recursion()
    def nan(self): return self.ok(rewards={"policy": {"exact": math.nan}})
    def infinite_fact(self): return self.ok(facts={"f": math.inf})
    def undeclared(self): return self.ok(rewards={"policy": {"extra": 1.0}})
    def stranger(self): return self.ok(rewards={"somebody": {"exact": 1.0}})
    def speaker(self): return self.ok(agent="somebody")
    def text_reward(self): return self.ok(rewards={"policy": {"exact": "1"}})
    def not_json(self): return self.ok(tools=({"tool": object()},))
    def fact_object(self): return self.ok(facts={"f": object()})
    def surrogate(self): return Turn((Message("user", "\\ud800"),))
    def huge(self): return Turn((Message("user", "x" * (70 * 2**20)),))
    def nothing(self): return None
    def random(self): return Turn((Message("user", str(random.SystemRandom().random())),))
    def flood(self): print("y" * 10**6); return self.ok()
    def grandchild(self):
        child = subprocess.Popen(["sleep", "1000"])
        (HERE / "grandchild").write_text(str(child.pid))
        time.sleep(1000)
    def keep(self):
        (HERE / "kept").write_text(tempfile.mkdtemp())
        time.sleep(1000)
    def close(self): (HERE / "closed").open("a").write("x")

class Mine(Environment):
    components = {"exact": 1.0}
    def size(self, split): return 10
    def task(self, split, index):
        return Task(f"{split}/{index}", self.config.label, split, index, {"word": f"w{index}"})
    def open(self, task, seed): return Talk(task, seed)

class Derived(SortDigits):
    def open(self, task, seed): return Talk(Task("", "", "train", 0, {"word": "d"}), seed)

class NotHere(Mine):
    def __init__(self, config):
        super().__init__(config)
        if os.environ["OWNER"] != str(os.getpid()):
            raise RuntimeError("not in a worker")
'''


class Memory(NoJournal):
    """A journal in a dict."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int], str] = {}

    def recall(self, session: str, turn: int) -> str | None:
        return self.rows.get((session, turn))

    def record(self, session: str, turn: int, failure: str) -> None:
        self.rows[session, turn] = failure

    def keep_traceback(self, text: str) -> None:
        """Nowhere."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "user.py").write_text(USER)
    return tmp_path


def make(
    folder: Path, *classes: str, workers: int = 1, deadline: float = 20.0, journal=None, check=lambda: None
) -> Host:
    settings = [
        resolve("environments", name, [folder]).Config(type=name)
        for name in (f"./user.py:{each}" for each in classes or ("Mine",))
    ]
    return Host(
        settings, folders=[folder], workers=workers, deadline=deadline, journal=journal or NoJournal(), check=check
    )


def begin(host: Host, names: list[str], label: str = "Mine") -> dict:
    environment = host.environments[label]
    return host.collect(host.open([(name, environment.task("train", i), 7) for i, name in enumerate(names)]))


def say(host: Host, **replies: str) -> dict:
    return host.collect(host.step([(name, Reply(Message("assistant", text), "end")) for name, text in replies.items()]))


def shown(outcome: Turn | SessionFailure) -> str:
    assert isinstance(outcome, Turn), outcome
    return outcome.messages[0].content


def gone(process: int) -> bool:
    """Whether a process has ended (a zombie that nobody reaps has)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def eventually(condition, seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def test_built_in_environments_run_in_process_and_score():
    settings = SortDigits.Config(type="sort_digits")
    with Host([settings], folders=[], workers=2, deadline=0.001, journal=NoJournal()) as host:
        environment = host.environments["sort_digits"]
        tasks = [environment.task("train", i) for i in range(3)]
        turns = host.collect(host.open([(str(i), task, 0) for i, task in enumerate(tasks)]))
        assert [shown(turns[str(i)]) for i in range(3)] == [f"sort {task.data['digits']}=" for task in tasks]
        replies = [
            (str(i), Reply(Message("assistant", environment.oracle(task)), "end")) for i, task in enumerate(tasks)
        ]
        done = host.collect(host.step(replies))
        assert all(turn.done and turn.rewards == {"policy": {"match": 1.0, "exact": 1.0}} for turn in done.values())


def test_user_code_runs_in_light_workers_assigned_by_the_order_of_opening(folder, capfd):
    with make(folder, "Mine", "Derived", workers=2) as host:
        turns = begin(host, list("abcd"))
        processes = [turns[name].facts["pid"] for name in "abcd"]
        assert processes[0] == processes[2] != processes[1] == processes[3]
        assert os.getpid() not in processes
        assert {turns[name].facts["torch"] for name in "abcd"} == {0.0}
        # A subclass of an audited class is a user's.
        assert begin(host, ["e"], "Derived")["e"].facts["pid"] in processes
        assert shown(say(host, a="hello")["a"]) == "1 hello 7"
        assert shown(say(host, a="flood")["a"]) == "2 flood 7"
    assert (folder / "closed").read_text() == "xxxxx"
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "environment worker 0: a print with no end of line" in printed.err
    assert "from a child" in printed.err
    assert "y" * 10**6 in printed.err


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("raises", r"ValueError: bad luck \(user.py:\d+\)"),
        ("long_error", r"ValueError: x{480,500} … "),
        ("exits", "SystemExit: 4"),
        ("memory", "MemoryError"),
        ("recursion", "RecursionError"),
        ("nan", "reward 'exact' is nan"),
        ("infinite_fact", "fact 'f' is inf"),
        ("undeclared", "reward component 'extra' is not declared"),
        ("stranger", "reward for agent 'somebody'"),
        ("speaker", "agent 'somebody' is not one of policy"),
        ("text_reward", "reward 'exact' must be a number, not str"),
        ("not_json", "tools are not JSON"),
        ("fact_object", "fact 'f' must be a number, not object"),
        ("surrogate", "not valid Unicode"),
        ("huge", "a message of 70 MiB is over the limit"),
        ("nothing", "must answer with a Turn, not NoneType"),
        ("die", "the worker process exited with code 3, twice"),
        ("hang", "no answer within 1 s"),
    ],
)
def test_a_failure_stays_in_its_session(folder, command, text):
    with make(folder, deadline=1.0 if command == "hang" else 20.0) as host:
        begin(host, ["good", "bad"])
        first = say(host, good="one", bad=command)
        assert isinstance(first["bad"], DeadlineExceeded if command == "hang" else SessionFailure)
        assert re.search(text, str(first["bad"]))
        # The neighbour goes on, in a new process where need be, with the turns of an undisturbed session.
        assert shown(first["good"]) == "1 one 7"
        assert shown(say(host, good="two")["good"]) == "2 two 7"
        with pytest.raises(ValueError, match="has failed"):
            host.step([("bad", Reply(Message("assistant", ""), "end"))])


def test_a_session_in_whose_turn_the_process_died_is_rebuilt_once(folder):
    with make(folder) as host:
        before = begin(host, ["a", "b"])
        say(host, a="one", b="one")
        after = say(host, a="die_once", b="two")
        assert shown(after["a"]) == "2 die_once 7"
        assert shown(after["b"]) == "2 two 7"
        assert (folder / "started").read_text() == "xxxx"  # both were opened again
        again = say(host, a="three")
        assert shown(again["a"]) == "3 three 7"
        assert before["a"].facts["pid"] > 0


def test_a_process_killed_while_idle_costs_nothing(folder):
    with make(folder) as host:
        process = int(begin(host, ["a"])["a"].facts["pid"])
        say(host, a="one")
        os.kill(process, signal.SIGKILL)
        assert shown(say(host, a="two")["a"]) == "2 two 7"


def test_a_session_that_cannot_be_rebuilt_as_it_was_fails(folder):
    with make(folder, deadline=1.0) as host:
        begin(host, ["chance", "bad"])
        assert isinstance(say(host, chance="random", bad="hang")["bad"], DeadlineExceeded)
        outcome = say(host, chance="two")["chance"]
        assert "showed other turns than before" in str(outcome)


def test_what_a_clock_decided_is_replayed_without_asking(folder):
    journal = Memory()
    with make(folder, deadline=1.0, journal=journal) as host:
        begin(host, ["s"])
        first = say(host, s="hang")["s"]
    assert journal.rows == {("s", 1): "no answer within 1 s"}
    with make(folder, deadline=60.0, journal=journal) as host:
        begin(host, ["s"])
        started = time.monotonic()
        again = say(host, s="hang")["s"]
        assert time.monotonic() - started < 5
    assert isinstance(again, SessionFailure)
    assert str(again) == str(first)
    assert journal.rows == {("s", 1): "no answer within 1 s"}


def test_requests_return_at_once_and_say_who_is_awaited(folder):
    words = set()
    host = make(folder, check=lambda: words.add(host.waiting()))
    with host:
        begin(host, ["a", "b"])
        started = time.monotonic()
        ticket = host.step([(name, Reply(Message("assistant", "slow"), "end")) for name in "ab"])
        assert not any(entry.outcome.done() for entry in ticket.entries)
        assert host.waiting() == ""
        assert list(host.collect(ticket)) == ["a", "b"]
        assert time.monotonic() - started > 0.55
    assert {"environment Mine, session a, turn 1", "environment Mine, session b, turn 1"} <= words


def test_a_kill_reaches_what_the_environment_started(folder):
    with make(folder, deadline=1.0) as host:
        begin(host, ["a"])
        assert isinstance(say(host, a="grandchild")["a"], DeadlineExceeded)
        assert eventually(lambda: gone(int((folder / "grandchild").read_text())))


def test_a_kill_removes_temporary_files(folder):
    with make(folder, deadline=1.0) as host:
        begin(host, ["a"])
        assert isinstance(say(host, a="keep")["a"], DeadlineExceeded)
        kept = Path((folder / "kept").read_text())
        assert kept.parent.name.startswith("mrlm-worker-")
        assert not kept.parent.exists()


def test_an_interrupt_of_the_terminal_is_the_trainers_matter(folder):
    with make(folder) as host:
        process = int(begin(host, ["a"])["a"].facts["pid"])
        assert os.getpgid(process) != os.getpgid(0)
        os.kill(process, signal.SIGINT)
        again = say(host, a="one")["a"]
        assert shown(again) == "1 one 7"
        assert not gone(process)
    assert gone(process)


def test_a_stopped_trainer_does_not_wait_for_a_hanging_session(folder, monkeypatch):
    monkeypatch.setattr(host_module, "GRACE_SECONDS", 0.2)
    asked = []

    def check() -> None:
        asked.append(1)
        if len(asked) > 2:
            raise KeyboardInterrupt

    host = make(folder, deadline=1000.0)
    begin(host, ["a"])
    host._check = check
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), host:
        say(host, a="hang")
    assert time.monotonic() - started < 5


def test_workers_end_when_the_trainer_is_killed(folder):
    script = f"""
import os, signal, sys
from pathlib import Path
from tests.test_host import begin, make, say
from mrlm_cli.records import Message, Reply
host = make(Path({str(folder)!r}))
print(int(begin(host, ["a"])["a"].facts["pid"]), flush=True)
host.step([("a", Reply(Message("assistant", "keep"), "end"))])
sys.stdin.read()
"""
    root = Path(__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as trainer:
        assert trainer.stdout is not None
        worker = int(trainer.stdout.readline())
        assert not gone(worker)
        assert eventually((folder / "kept").exists)
        trainer.kill()
    assert eventually(lambda: gone(worker))
    assert not Path((folder / "kept").read_text()).parent.exists()


def test_a_worker_that_cannot_start_is_no_failure_of_a_session(folder, monkeypatch):
    monkeypatch.setenv("OWNER", str(os.getpid()))
    with make(folder, "NotHere") as host, pytest.raises(MrlmError, match="cannot start: RuntimeError: not in a worker"):
        begin(host, ["a"], "NotHere")


def test_mistakes_of_the_caller(folder):
    with pytest.raises(UserError, match="two environments are called 'sort_digits'"):
        Host([SortDigits.Config(type="sort_digits")] * 2, folders=[], workers=1, deadline=1.0, journal=NoJournal())
    with make(folder) as host:
        begin(host, ["a"])
        with pytest.raises(ValueError, match="'a' is already open"):
            begin(host, ["a"])
        host.close(["a", "unknown"])
        with pytest.raises(ValueError, match="'a' is not open"):
            say(host, a="one")


def test_a_host_of_built_in_environments_starts_no_process():
    settings = EnvironmentSettings(type="sort_digits")
    assert settings.label == "sort_digits"
    with Host(
        [SortDigits.Config(type="sort_digits")], folders=[], workers=4, deadline=1.0, journal=NoJournal()
    ) as host:
        assert host._workers == []

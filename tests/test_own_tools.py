"""Tools and tasks that users bring: functions by name, files of tasks, worker processes, and what goes wrong."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mrlm_cli import api, blame
from mrlm_cli.envs.base import EnvironmentSettings
from mrlm_cli.envs.conformance import SPLITS, problems
from mrlm_cli.envs.host import Host, NoJournal
from mrlm_cli.envs.tool_schema import MOST_ANSWER, MOST_SAID
from mrlm_cli.envs.tools import Tools
from mrlm_cli.errors import SessionFailure, UserError
from mrlm_cli.records import Message, Reply, Turn

ROOT = Path(__file__).parents[1]
MINE = '''
import os, time
from mrlm_cli.envs.tool_schema import ToolError

def twice(number: int) -> int:
    """Double a number."""
    return 2 * number

def process(unit: str = "") -> str:
    """Which process this is."""
    return str(os.getpid())

def refuses(word: str) -> str:
    """Never content."""
    raise ToolError(f"not {word}; try another")

def breaks(word: str) -> str:
    """Broken."""
    return {}["x" * 1000]

def sleeps(seconds: int) -> str:
    """Takes its time."""
    time.sleep(seconds)
    return "awake"

def backtracks(length: int) -> str:
    """Holds the interpreter's lock."""
    import re
    return str(re.match("(a+)+$", "a" * length + "b"))

def leaves(how: str) -> str:
    """Ends its process."""
    if how == "exit":
        raise SystemExit(3)
    os._exit(3)

def fails(word: str) -> str:
    """Says that the machine is to blame."""
    from mrlm_cli.errors import SessionFailure
    raise SessionFailure("no disk")

def counts(number: float) -> str:
    """Say a number."""
    return "x" * 5000 if number == 1 else repr(number)

def calculator(expression: str) -> str:
    """Named as a built-in one."""
    return expression

def untyped(word):
    """No types."""
    return word

def silent(word: str) -> str:
    return word

def stranger(word: "Unheard") -> str:
    """Of a type that is not there."""
    return word

number = 3
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    write(tmp_path / "tasks.jsonl", [{"question": f"What is twice {n}?", "answer": 2 * n} for n in range(20)])
    return tmp_path


def write(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def settings(folder: Path, *functions: str, **fields) -> EnvironmentSettings:
    named = [f"{folder / 'mine.py'}:{name}" for name in functions]
    given = {"type": "tools", "path": str(folder / "tasks.jsonl"), "functions": named, **fields}
    return Tools.Config.model_validate_json(json.dumps(given))


def call(name: str, **arguments) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def talk(config: EnvironmentSettings, *replies: str, deadline: float = 20.0) -> list[Turn | SessionFailure]:
    with Host([config], folders=[], workers=1, deadline=deadline, journal=NoJournal()) as host:
        task = host.environments["tools"].task("train", 0)
        found = [host.collect(host.open([("a", task, 0)]))["a"]]
        for reply in replies:
            found.append(host.collect(host.step([("a", Reply(Message("assistant", reply), "end"))]))["a"])
        return found


def test_conformance_of_functions_and_a_file(folder) -> None:
    config = settings(folder, "twice", tools=["notes"])
    assert problems(Tools(config)) == []
    made = Tools(config)
    assert sum(made.size(split) for split in SPLITS) == 20
    assert not made.in_process


def test_a_function_is_called_in_a_worker_process(folder) -> None:
    first, answer, end = talk(settings(folder, "twice", "process"), call("process"), "<answer>no</answer>")
    schema = {"type": "object", "properties": {"number": {"type": "integer"}}, "required": ["number"]}
    told = {"name": "twice", "description": "Double a number.", "parameters": schema}
    assert json.dumps(told) in first.messages[0].content
    number = answer.messages[0].content.removeprefix("<tool_result>").removesuffix("</tool_result>")
    assert number.isdigit()
    assert int(number) != os.getpid()
    assert end.facts == {"calls": 1.0, "wrong_calls": 0.0, "late_calls": 0.0, "broken_calls": 0.0}


def test_what_a_function_raises_is_told_and_counted(folder, capfd) -> None:
    config = settings(folder, "refuses", "breaks", "twice")
    turns = talk(config, call("refuses", word="so"), call("breaks", word="a"), call("twice", number="b"), "no")
    said = [turn.messages[0].content for turn in turns[1:4]]
    assert said[0] == "<tool_result>error: not so; try another</tool_result>"
    assert said[1].startswith("<tool_result>error: breaks failed: KeyError: 'xxx")
    assert len(said[1]) < MOST_SAID + 50
    assert said[2] == "<tool_result>error: twice: the argument number must be an integer</tool_result>"
    assert turns[4].facts == {"calls": 3.0, "wrong_calls": 3.0, "late_calls": 0.0, "broken_calls": 1.0}
    assert "environment worker 0: tools: KeyError: 'xxx" in capfd.readouterr().err, "nobody is told where"


@pytest.mark.parametrize("debug", [False, True])
def test_a_whole_traceback_of_a_function_is_shown_with_debug(folder, capfd, monkeypatch, debug) -> None:
    monkeypatch.setattr(blame, "debug", debug)
    talk(settings(folder, "breaks"), call("breaks", word="a"), "no")
    told = capfd.readouterr().err
    assert ("Traceback (most recent call last)" in told) == debug
    assert ("--debug prints the whole traceback" in told) != debug


def test_the_right_answer_of_a_file_is_exact(folder) -> None:
    environment = Tools(settings(folder, "twice"))
    task = environment.task("train", 3)
    (answer,) = environment.oracle(task)
    number = int(task.data["question"].split()[-1].strip("?"))
    assert answer == f"<answer>{2 * number}</answer>"
    session = environment.open(task, 0)
    session.start()
    assert (
        f">{2 * number}<"
        in session.step(Reply(Message("assistant", call("twice", number=number)), "end")).messages[0].content
    )
    assert session.step(Reply(Message("assistant", answer), "end")).rewards["policy"]["exact"] == 1.0


def said(turn) -> list[str]:
    assert isinstance(turn, Turn), turn
    return [line.removeprefix("<tool_result>").removesuffix("</tool_result>") for line in
            turn.messages[0].content.splitlines()]  # fmt: skip


def test_a_function_that_hangs_is_told_and_the_session_goes_on(folder) -> None:
    """Or a policy could have its sessions left out of the training."""
    config = settings(folder, "sleeps", "backtracks", "process", deadline=1.0, calls=6)
    hangs = [call("sleeps", seconds=60), call("backtracks", length=60)]
    turns = talk(config, call("process"), *hangs, call("process"), hangs[0] * 8, call("process"), "no", deadline=30.0)
    assert said(turns[2]) == ["error: sleeps: the call took longer than 1 s"]
    assert said(turns[3]) == ["error: backtracks: the call took longer than 1 s"]
    left = ["error: no time is left for calls in this reply"]
    assert said(turns[5]) == ["error: sleeps: the call took longer than 1 s", *left * 7]
    processes = [said(turns[place])[0] for place in (1, 4, 6)]
    assert len(set(processes)) == 3
    assert all(process.isdigit() and ended(Path("/proc", process)) for process in processes)
    assert turns[7].facts == {"calls": 13.0, "wrong_calls": 10.0, "late_calls": 10.0, "broken_calls": 0.0}


def test_no_deadline_counts_the_start_of_the_functions_process(folder) -> None:
    """The first one, or that after a call that ended it, also between the calls of one reply."""
    slow = "import sys, time\nif sys.argv[0].endswith('tool_worker.py'):\n    time.sleep(4)\n"
    (folder / "mine.py").write_text(slow + MINE)
    config = settings(folder, "process", "leaves", "sleeps", deadline=1.5, calls=4)
    asked = [call("process"), call("leaves", how="now") + 2 * call("process"), call("sleeps", seconds=60)]
    _, first, second, late = talk(config, *asked, deadline=3.0)
    (before,), (left, *after) = said(first), said(second)
    assert left == "error: leaves failed: the worker process exited with code 3"
    assert after[0] == after[1]
    assert after[0].isdigit()
    assert before.isdigit()
    assert before != after[0]
    assert said(late) == ["error: sleeps: the call took longer than 1.5 s"]  # which does count


def test_calls_of_one_reply_share_their_time(folder) -> None:
    config = settings(folder, "sleeps", deadline=3.0, calls=1)
    begun = time.monotonic()
    first, second = said(talk(config, call("sleeps", seconds=2) * 2)[1])
    assert time.monotonic() - begun < 15
    assert (first, second) == ("awake", "error: sleeps: the calls of this reply took longer than 3 s")


def test_a_function_that_ends_its_process_is_told_and_one_that_blames_the_machine_is_not(folder) -> None:
    config = settings(folder, "leaves", "twice", "fails", calls=4)
    asked = [call("leaves", how="exit"), call("leaves", how="now"), call("twice", number=4), call("fails", word="a")]
    _, left, ended, answer, failed = talk(config, *asked)
    assert said(left) == ["error: leaves failed: SystemExit: 3"]
    assert said(ended) == ["error: leaves failed: the worker process exited with code 3"]
    assert said(answer) == ["8"]
    assert isinstance(failed, SessionFailure)
    assert str(failed) == "no disk"


def test_odd_arguments_and_long_answers_cross_to_the_process(folder) -> None:
    config = settings(folder, "counts", "refuses", calls=9)
    odd = [call("counts", number=float("nan")), call("counts", number=10**4000), call("refuses", word="\ud800 \0")]
    _, *turns = talk(config, *odd, call("counts", number=1), call("counts", number=2.5))
    told = [said(turn)[0] for turn in turns]
    assert told[0].startswith("error: counts: the arguments cannot be sent: ")
    assert told[1] == str(10**4000)[:MOST_ANSWER] + " …"
    assert told[2].startswith("error: not ")
    assert told[3] == "x" * MOST_ANSWER + " …"
    assert told[4] == "2.5"


def test_the_process_ends_with_the_one_that_started_it(folder) -> None:
    """Even while a function holds the interpreter's lock: it would keep a processor busy for ever."""
    if sys.platform != "linux":
        pytest.skip("elsewhere it ends when the function returns")
    program = f"""
import time
from tests.test_own_tools import *
made = Tools(settings(Path({str(folder)!r}), "process", "backtracks"))
process, hangs = made._functions.tools
print(process.call({{}}, 60.0), flush=True)
hangs.call({{"length": 60}}, 60.0)
"""
    given = {**os.environ, "TMPDIR": str(folder)}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, env=given, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        process = Path("/proc", parent.stdout.readline().strip())
        assert process.name.isdigit()
        time.sleep(0.5)
        assert process.exists()
        parent.kill()
    assert ended(process)


def ended(process: Path) -> bool:
    """Whether it has, after 5 seconds at most; nobody may have reaped it."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        try:
            if (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_a_task_may_offer_some_tools_alone(folder) -> None:
    rows = [{"question": f"{n}?", "answer": "x", "tools": ["twice", "read_note"]} for n in range(5)]
    write(folder / "tasks.jsonl", rows)
    first, answer = talk(settings(folder, "twice", "process", tools=["notes"]), call("process"))
    listed = first.messages[0].content.split("\n")[1:3]
    assert [json.loads(line)["name"] for line in listed] == ["read_note", "twice"]
    assert "there is no tool 'process'; there are read_note, twice" in answer.messages[0].content


@pytest.mark.parametrize(
    ("functions", "fields", "match"),
    [
        (["calculator"], {"tools": ["calculator"]}, "two tools are called 'calculator'"),
        (["untyped"], {}, "untyped cannot be a tool: .*parameter word needs a type"),
        (["silent"], {}, "silent cannot be a tool: .*no docstring"),
        (["stranger"], {}, "stranger cannot be a tool: name 'Unheard' is not defined"),
        (["number"], {}, "has no function 'number'"),
        (["absent"], {}, "has no function 'absent'"),
    ],
)
def test_what_cannot_be_a_tool_is_told_at_once(folder, functions, fields, match) -> None:
    with pytest.raises(UserError, match=match):
        Tools(settings(folder, *functions, **fields))


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([{"answer": 1}] * 3, r"tasks\.jsonl:1 has no text called question"),
        ([{"question": "a"}], r"tasks\.jsonl:1: expected `answer`"),
        ([{"question": "a", "answer": True}], "expected `answer`"),
        ([{"question": "a", "answer": 1, "tools": "twice"}], "tools must be a list of names"),
        ([{"question": "a", "answer": 1, "tools": ["thrice"]}], "no tool is called 'thrice'; there are twice"),
        ([{"question": "a", "answer": 1}, {"question": " A ", "answer": 2}], "holds 1 questions; expected at least 3"),
    ],
)
def test_broken_files_are_named(folder, rows, match) -> None:
    write(folder / "tasks.jsonl", rows)
    with pytest.raises(UserError, match=match):
        Tools(settings(folder, "twice")).size("train")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"functions": ["mine.py"]}, "expected ./file.py:name"),
        ({"functions": ["a:b", "a:b"]}, "names one of them twice"),
        ({"functions": [], "tools": []}, "say with tools, functions or mcp"),
    ],
)
def test_settings_that_do_not_fit(folder, fields, match) -> None:
    with pytest.raises(ValueError, match=match):
        settings(folder, "twice", **fields)


def test_the_example_trains_and_its_tasks_are_those_of_its_table(tmp_path, monkeypatch) -> None:
    run = [sys.executable, "recipes/my_tools.py"]
    made = subprocess.run(run, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    assert made.stdout == (ROOT / "recipes/my_tools.jsonl").read_text()
    monkeypatch.chdir(tmp_path)
    composed = api.load_recipe("my_tools_smoke", ["hardware.threads=1", "evaluate.tasks=2"])
    (environment,) = composed.recipe.environments
    assert Path(environment.functions[0].rpartition(":")[0]).is_file()
    assert problems(Tools(environment)) == []
    folder = api.train(composed, plain=True)
    (plugin,) = json.loads((folder / "origin.json").read_text())["plugins"]
    assert plugin.endswith("my_tools.py")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["failed_rate"] for row in rows] == [0.0, 0.0]
    assert {"fact/tools/late_calls", "fact/tools/broken_calls"} <= rows[0].keys()


def test_what_a_function_has_started_ends_with_the_run(folder) -> None:
    sleeper = """
import subprocess

def sleeper() -> str:
    "Start something that lasts."
    return str(subprocess.Popen(["sleep", "300"]).pid)
"""
    (folder / "mine.py").write_text(MINE + sleeper)
    _, answer = talk(settings(folder, "sleeper"), call("sleeper"))
    number = answer.messages[0].content.removeprefix("<tool_result>").removesuffix("</tool_result>")
    status, until = Path(f"/proc/{number}/stat"), time.monotonic() + 5
    while status.exists() and status.read_text().split()[2] != "Z":
        assert time.monotonic() < until, "it lives on"
        time.sleep(0.05)

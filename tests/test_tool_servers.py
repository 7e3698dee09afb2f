"""Tools of MCP servers: listed, called, refused, late, dead, and ended with the process that started them."""

import contextlib
import glob
import json
import os
import sys
import time
from pathlib import Path

import pytest

from mrlm_cli.envs.host import Host, NoJournal
from mrlm_cli.envs.tool_servers import ServerSettings
from mrlm_cli.envs.tools import Tools
from mrlm_cli.errors import MissingExtra, SessionFailure
from mrlm_cli.recipe import compose
from mrlm_cli.records import Message, Reply, Turn
from mrlm_cli.training.journal import Journal

SERVER = str(Path(__file__).with_name("mcp_server.py"))


@pytest.fixture
def path(tmp_path: Path) -> str:
    rows = [{"question": f"What is {n} + {n}?", "answer": 2 * n, "tools": None} for n in range(9)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "tasks.jsonl")


def settings(path: str, *, tools=(), calls=9, **fields) -> Tools.Config:
    server = {"command": [sys.executable, SERVER], **fields}
    given = {"type": "tools", "path": path, "mcp": [server], "tools": tools, "calls": calls}
    return Tools.Config.model_validate_json(json.dumps(given))


def call(name: str, **arguments) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def sessions(config: Tools.Config, *talks: list[str], deadline: float = 30.0) -> list[list[Turn | SessionFailure]]:
    """Each talk in a session of its own, one after the other in one worker process."""
    found = []
    with Host([config], folders=[], workers=1, deadline=deadline, journal=NoJournal()) as host:
        for number, replies in enumerate(talks):
            name = str(number)
            turns = [host.collect(host.open([(name, host.environments["tools"].task("train", 0), 0)]))[name]]
            for text in replies:
                turns.append(host.collect(host.step([(name, Reply(Message("assistant", text), "end"))]))[name])
            host.close([name])
            found.append(turns)
    return found


def said(turn) -> str:
    assert isinstance(turn, Turn), turn
    return turn.messages[0].content.removeprefix("<tool_result>").removesuffix("</tool_result>")


def gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_tools_are_listed_called_and_refused(path, monkeypatch) -> None:
    monkeypatch.setenv("MRLM_TEST_VARIABLE", "seen")
    monkeypatch.setenv("MRLM_TEST_SECRET", "hidden")
    config = settings(path, tools=["calculator"], variables=["MRLM_TEST_VARIABLE"])
    asked = [
        call("add", a=2, b=3), call("calculator", expression="6*7"), call("add", a="x", b=1), call("refuse"),
        call("add"), call("absent"), "<tool_call>{\"name\": \"add\", \"arguments\": [1]}</tool_call>", call("process"),
    ]  # fmt: skip
    ((first, *answers),) = sessions(config, asked)
    listed = [json.loads(line)["name"] for line in said(first).splitlines() if line.startswith('{"name"')]
    assert listed == ["calculator", "add", "keep", "refuse", "sleep", "die", "process"]
    assert '"description": "Add two whole numbers."' in said(first)
    told = [said(turn) for turn in answers]
    assert told[:2] == ["5", "42"]
    assert all(text.startswith("error: ") for text in told[2:7])
    assert "refuse" in told[3]
    assert "valid integer" in told[2]
    assert "there is no tool 'absent'" in told[5]
    process, variable, secret = told[7].split()
    assert (variable, secret) == ("seen", "None")
    until = time.monotonic() + 10
    while not gone(int(process)) and time.monotonic() < until:
        time.sleep(0.05)
    assert gone(int(process))


def test_no_arguments_break_the_connection(path) -> None:
    deep: object = 1
    for _ in range(300):
        deep = {"a": deep}
    hostile = [{"a": "\ud800"}, {"\udfff": 1}, {"a": float("nan")}, {"a": float("inf")}, {"a": [deep]}]
    more = [{"a": 10**4000}, {"a": "x" * 100_000}, {"": "\0"}, {"_meta": {"progressToken": 1}}]
    asked = [call("process"), *(call("add", **each) for each in (*hostile, *more)), call("process")]
    ((_, first, *answers, last),) = sessions(settings(path, calls=20), asked)
    assert [said(turn).removeprefix("error: add: ") for turn in answers[:5]] == [
        "a text in the arguments holds half a character",
        "a text in the arguments holds half a character",
        "a number in the arguments is not finite",
        "a number in the arguments is not finite",
        "arguments are nested 302 deep; expected at most 50",
    ]
    assert all(said(turn).startswith("error: ") for turn in answers)
    assert said(last) == said(first), "the server was started anew"


def test_a_server_that_dies_or_is_late_is_told_and_the_session_goes_on(path) -> None:
    """Or a policy could have its sessions left out of the training."""
    config = settings(path, deadline=1.0)
    died, first, shared, late = sessions(
        config,
        [call("die"), call("add", a=1, b=1), "no"],
        [call("keep", text="one")],
        [call("keep", text="two")],
        [call("sleep", seconds=60) * 3, call("keep", text="three"), "no"],
        deadline=20.0,
    )
    assert said(died[1]) == "error: die failed: its server ended and is started anew"
    assert said(died[2]) == "2"
    assert died[3].facts == {"calls": 2.0, "wrong_calls": 1.0, "late_calls": 0.0, "broken_calls": 1.0}
    assert [said(turns[1]) for turns in (first, shared)] == ["one", "one two"]
    assert late[1].messages[0].content.splitlines() == [
        "<tool_result>error: sleep: the call took longer than 1 s</tool_result>",
        *["<tool_result>error: no time is left for calls in this reply</tool_result>"] * 2,
    ]
    assert said(late[2]) == "three", "it is another server, which keeps nothing of the first"
    assert late[3].facts == {"calls": 4.0, "wrong_calls": 3.0, "late_calls": 3.0, "broken_calls": 0.0}


def test_no_deadline_counts_the_start_of_a_server(path) -> None:
    slow = f"import runpy, time; time.sleep(4); runpy.run_path({SERVER!r}, run_name='__main__')"
    config = settings(path, command=[sys.executable, "-c", slow], deadline=1.5)
    ((_, died),) = sessions(config, [call("die") + call("add", a=1, b=1) * 2], deadline=3.0)
    lines = died.messages[0].content.splitlines()
    assert lines == [
        "<tool_result>error: die failed: its server ended and is started anew</tool_result>",
        *["<tool_result>2</tool_result>"] * 2,
    ]


def test_a_fresh_server_keeps_nothing_between_sessions(path) -> None:
    talks = [[call("keep", text="one")], [call("keep", text="two")]]
    assert [said(turns[1]) for turns in sessions(settings(path, fresh=True), *talks)] == ["one", "two"]


def test_a_server_that_cannot_start_is_named(path) -> None:
    ((outcome,),) = sessions(settings(path, command=["/no/such/program"]), [])
    assert isinstance(outcome, SessionFailure)
    assert "tool server /no/such/program cannot start" in str(outcome)


def test_a_missing_extra_is_named(path, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"mrlm\[mcp\]"):
        Tools(settings(path))


def test_a_command_is_found_beside_the_recipe_and_its_deadline_is_checked(tmp_path, path) -> None:
    (tmp_path / "server.py").write_text("")
    text = (
        "name: x\nsteps: 1\nmodel: {type: scratch}\nalgorithm: {type: ppo}\n"
        "environments: [{type: tools, path: tasks.jsonl, mcp: [{command: [python, ./server.py]}]}]\n"
    )
    (tmp_path / "r.yaml").write_text(text)
    (environment,) = compose.load(str(tmp_path / "r.yaml")).recipe.environments
    assert environment.mcp == (ServerSettings(command=("python", str(tmp_path / "server.py"))),)
    with pytest.raises(Exception, match=r"r\.yaml:5:.* environments\.0\.mcp\.0.*deadline.*hardware\.deadline"):
        compose.load(str(tmp_path / "r.yaml"), ["hardware.deadline=5"])
    functions = ['environments.0.functions=["time:sleep"]', "environments.0.mcp=[]"]
    with pytest.raises(Exception, match=r"environments\.0\.deadline.*\(10\) must be below hardware\.deadline = 10"):
        compose.load(str(tmp_path / "r.yaml"), ["hardware.deadline=10", *functions])


def test_a_session_that_does_not_begin_leaves_no_server(path) -> None:
    given = settings(path, fresh=True).model_dump()
    config = Tools.Config.model_validate({**given, "mcp": [*given["mcp"], *given["mcp"]]})
    environment = Tools(config)
    before = servers_of_mine()  # of other tests in this process
    with pytest.raises(SessionFailure, match="two tools are called"):
        environment.open(environment.task("train", 0), 0)
    end = time.monotonic() + 20
    while (left := servers_of_mine() - before) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left


def servers_of_mine() -> set[str]:
    """Numbers of this process's children that are tool servers; one on its way out may vanish meanwhile."""
    found = set()
    for file in glob.glob(f"/proc/{os.getpid()}/task/*/children"):
        for child in Path(file).read_text().split():
            with contextlib.suppress(OSError):
                if "mcp_server.py" in Path(f"/proc/{child}/cmdline").read_text():
                    found.add(child)
    return found


def test_a_resume_repeats_what_a_server_said(path, tmp_path) -> None:
    """Another server would say something else; a session is rebuilt with it for answers that were not given yet."""
    config = settings(path)
    process, three = call("process"), call("add", a=1, b=2)

    def run(**talks: list[str]) -> dict[str, list[Turn | SessionFailure]]:
        journal, found = Journal(tmp_path / "journal.jsonl"), {}
        with Host([config], folders=[], workers=1, deadline=30.0, journal=journal) as host:
            for name, replies in talks.items():
                turns = [host.collect(host.open([(name, host.environments["tools"].task("train", 0), 0)]))[name]]
                for text in replies:
                    turns.append(host.collect(host.step([(name, Reply(Message("assistant", text), "end"))]))[name])
                found[name] = turns
        return found

    first = run(whole=[process, three, "no"], begun=[three], changed=[process, three])
    again = run(
        whole=[process, three, "no"], begun=[three, call("add", a=3, b=3)], changed=[process, process], new=[process]
    )
    assert again["whole"] == first["whole"]
    assert again["begun"][:2] == first["begun"]
    assert said(again["begun"][2]) == "6"
    assert again["changed"][:2] == first["changed"][:2]
    assert isinstance(again["changed"][2], SessionFailure)  # the rebuilt session shows another server's process
    assert "showed other turns than before" in str(again["changed"][2])
    assert said(again["new"][1]) != said(first["whole"][1])

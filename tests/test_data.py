"""Rows of files → transcripts: forms and columns, bad rows, splits."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from mrlm_cli.data.base import AGENT, Group
from mrlm_cli.data.load import Loaded, of
from mrlm_cli.errors import MissingExtra, UserError
from tests.data_helpers import chat_row, chats, jsonl, pair_row
from tests.kit import settings, tiny, trainer


def load(path: Path, kind: str = "jsonl", **fields: Any) -> Loaded:
    return of(settings("data", type=kind, path=str(path), **fields), ())


def said(group: Group) -> list[list[tuple[str, str]]]:
    return [[(each.role, each.content) for each in one.views[AGENT]] for one in group]


def given(group: Group) -> list[int]:
    return [one.task.data["given"] for one in group]


def test_a_conversation_is_one_transcript_and_what_comes_before_the_first_reply_is_given(tmp_path: Path) -> None:
    row = {"messages": [{"role": "system", "content": "s"}, *chat_row("31")["messages"]]}
    (group,) = load(jsonl(tmp_path / "x.jsonl", [row]), validation_share=0).train
    assert said(group) == [[("system", "s"), ("user", "sort 31="), ("assistant", "13")]]
    assert given(group) == [2]


def test_messages_with_from_and_value_are_the_same_conversation(tmp_path: Path) -> None:
    other = [{"from": who, "value": text} for who, text in (("system", "s"), ("human", "31"), ("gpt", "13"))]
    usual = [{"role": who, "content": text} for who, text in (("system", "s"), ("user", "31"), ("assistant", "13"))]
    (ours,) = load(
        jsonl(tmp_path / "x.jsonl", [{"conversations": other}]),
        columns={"messages": "conversations"},
        validation_share=0,
    ).train
    (theirs,) = load(jsonl(tmp_path / "y.jsonl", [{"messages": usual}]), validation_share=0).train
    assert ours[0].views == theirs[0].views
    (pair,) = load(
        jsonl(tmp_path / "z.jsonl", [{"prompt": other[:2], "chosen": other[2:], "rejected": "31"}]),
        form="pairs",
        validation_share=0,
    ).train
    assert said(pair)[0] == said(ours)[0]


def test_a_reply_may_be_empty_where_another_says_something(tmp_path: Path) -> None:
    ask, silent = {"role": "user", "content": "x"}, {"role": "assistant", "content": ""}
    call = {**silent, "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {}}}]}
    rows = [{"messages": [ask, silent, *GOOD["messages"]]}, {"messages": [ask, call]}]
    assert len(load(jsonl(tmp_path / "x.jsonl", rows), validation_share=0).train) == 2
    (pair,) = load(jsonl(tmp_path / "y.jsonl", [pair_row("21", "")]), form="pairs", validation_share=0).train
    assert [side[-1] for side in said(pair)] == [("assistant", "12"), ("assistant", "")]


def test_a_completion_and_its_columns(tmp_path: Path) -> None:
    rows = [
        {"q": "1+1=", "a": "2"},
        {"q": [{"role": "user", "content": "x"}], "a": [{"role": "assistant", "content": "y"}]},
    ]
    found = load(
        jsonl(tmp_path / "x.jsonl", rows),
        form="completion",
        columns={"prompt": "q", "completion": "a"},
        validation_share=0,
    ).train
    assert [said(group) for group in found] == [
        [[("user", "1+1="), ("assistant", "2")]],
        [[("user", "x"), ("assistant", "y")]],
    ]


def test_the_preferred_side_comes_first_and_carries_the_reward(tmp_path: Path) -> None:
    (group,) = load(jsonl(tmp_path / "x.jsonl", [pair_row("21")]), form="pairs", validation_share=0).train
    assert said(group) == [
        [("user", "sort 21="), ("assistant", "12")],
        [("user", "sort 21="), ("assistant", "210")],
    ]
    assert [one.rewards for one in group] == [(("policy", 0, "preferred", 1.0),), (("policy", 0, "preferred", 0.0),)]
    assert [one.sample for one in group] == [0, 1]


@pytest.mark.parametrize("besides", [{}, {"prompt": "sort 21="}])
def test_two_whole_conversations_share_their_beginning_as_prompt(tmp_path: Path, besides: dict[str, str]) -> None:
    shared = [*chat_row("21")["messages"], {"role": "user", "content": "again"}]
    row = {
        **besides,
        "chosen": [*shared, {"role": "assistant", "content": "12"}],
        "rejected": [*shared, {"role": "assistant", "content": "21"}],
    }
    (group,) = load(jsonl(tmp_path / "x.jsonl", [row]), form="pairs", validation_share=0).train
    assert given(group) == [3, 3]
    assert [side[-1] for side in said(group)] == [("assistant", "12"), ("assistant", "21")]


GOOD = chat_row("12")
BAD: list[tuple[str, Any, str, str]] = [
    ("chat", "not json", ":2", "the line is not JSON"),
    ("chat", "[" * 5000 + "]" * 5000, ":2", "the line is not JSON"),
    ("chat", [1], ":2", "a row is not an object"),
    ("chat", {"text": "x"}, ":2", "column messages is missing"),
    ("chat", {"messages": "x"}, ":2", "column messages is not a list of messages"),
    ("chat", {"messages": [{"role": "user", "content": "x"}]}, ":2", "no assistant turn"),
    ("chat", {"messages": []}, ":2", "no assistant turn"),
    ("chat", {"messages": [{"role": "bot", "content": "x"}]}, ":2", "unknown role"),
    ("chat", {"messages": [{"role": "assistant", "content": 1}]}, ":2", "content is not text"),
    ("chat", {"messages": [{"role": "assistant", "content": "x", "weight": 0}]}, ":2", "unknown key: messages: weight"),
    ("chat", {"messages": ["x"]}, ":2", "a message is not a mapping"),
    ("chat", {"messages": [{"role": "assistant", "content": "\ud800"}]}, ":2", "not valid Unicode"),
    ("chat", {"messages": [{"from": "human", "value": "x"}]}, ":2", "no assistant turn"),
    ("chat", {"messages": [{"from": "observation", "value": "x"}]}, ":2", "unknown role: messages: 'observation'"),
    ("chat", {"messages": [{"from": ["gpt"], "value": "x"}]}, ":2", "unknown role: messages: ['gpt']"),
    ("chat", {"messages": [{"from": "gpt"}]}, ":2", "content is not text"),
    ("chat", {"messages": [{"from": "gpt", "content": "x"}]}, ":2", "unknown key: messages: from"),
    ("chat", {"messages": [{"from": "gpt", "value": ""}]}, ":2", "the assistant says nothing: column messages"),
    ("completion", {"prompt": "x", "completion": " \n"}, ":2", "the assistant says nothing: column completion"),
    ("pairs", {"prompt": "x", "chosen": "", "rejected": "a"}, ":2", "the assistant says nothing: column chosen"),
    ("completion", {"prompt": "x"}, ":2", "column completion is missing: the row has prompt"),
    ("completion", {"prompt": "x", "completion": []}, ":2", "does not begin with the assistant's turn"),
    ("pairs", {"prompt": "x", "chosen": "a", "rejected": "a"}, ":2", "both sides are equal"),
    ("pairs", {"prompt": "x", "chosen": "a"}, ":2", "column rejected is missing"),
    ("pairs", {"question": "x", "chosen": "a", "rejected": "b"}, ":2", "column prompt is missing: the two sides"),
    ("pairs", {"chosen": "a", "rejected": [{"role": "user", "content": "a"}]}, ":2", "does not begin with"),
    (
        "pairs",
        {"prompt": "x", "chosen": GOOD["messages"], "rejected": chat_row("13")["messages"]},
        ":2",
        "does not begin with the assistant's turn: column chosen begins with user",
    ),
    (
        "pairs",
        {"prompt": "x", "chosen": "a", "rejected": [*GOOD["messages"][1:], *GOOD["messages"][:1]]},
        ":2",
        "does not end with the assistant's turn",
    ),
]
FIRST = {"chat": GOOD, "completion": {"prompt": "p", "completion": "c"}, "pairs": pair_row("21")}


@pytest.mark.parametrize(
    ("form", "row", "place", "reason"), BAD, ids=[f"{form} {reason}" for form, _, _, reason in BAD]
)
def test_a_bad_row_is_an_error_with_its_place_or_counted(
    tmp_path: Path, form: str, row: Any, place: str, reason: str
) -> None:
    path = tmp_path / "x.jsonl"
    line = row if isinstance(row, str) else json.dumps(row)
    path.write_text(f"{json.dumps(FIRST[form])}\n{line}\n")
    with pytest.raises(UserError) as caught:
        load(path, form=form)
    assert f"{path}{place}: " in str(caught.value)
    assert reason in str(caught.value)
    found = load(path, form=form, bad_rows="exclude", validation_share=0)
    assert len(found.train) == 1
    ((counted, places),) = found.left_out.items()
    assert f"{path}{place}: {counted}" in str(caught.value)
    assert places == (f"{path}{place}",)
    assert f"1 row left out, {counted}: {path}{place}" in "".join(found.notes())


def test_many_bad_rows_are_told_in_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x.jsonl:5: [^\n]*\nand 3 more bad rows\nmend them, say in data.columns how "):
        load(jsonl(tmp_path / "x.jsonl", [{}] * 8))
    with pytest.raises(UserError, match=r"and 3 more bad rows\nmend them, or leave them out with"):
        load(jsonl(tmp_path / "y.jsonl", [{"messages": []}, *[{}] * 7]))
    with pytest.raises(UserError, match=r"no assistant turn\nmend it, or leave it out with data.bad_rows=exclude$"):
        load(jsonl(tmp_path / "z.jsonl", [{"messages": []}]))


@pytest.mark.parametrize(("kind", "text"), [("jsonl", ""), ("jsonl", "\n\n"), ("json", ""), ("json", "[]")])
def test_an_empty_file_is_an_error(tmp_path: Path, kind: str, text: str) -> None:
    (tmp_path / "x").write_text(text)
    with pytest.raises(UserError, match=r"the data \S+/x holds no usable row"):
        load(tmp_path / "x", kind)
    held = {"validation_path": str(tmp_path / "x")}
    good = tmp_path / "good"
    good.write_text(json.dumps(GOOD) if kind == "jsonl" else json.dumps([GOOD]))
    with pytest.raises(UserError, match=r"the data \S+/x, held out \(validation\), holds no usable row"):
        load(good, kind, **held)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        load(tmp_path / "none", kind)


@pytest.mark.parametrize(("rows", "told"), [(1, "there is only one row"), (3, "all rows have the same prompt")])
def test_rows_of_one_prompt_cannot_be_held_out(tmp_path: Path, rows: int, told: str) -> None:
    path = jsonl(tmp_path / "x.jsonl", [chat_row("1")] * rows)
    with pytest.raises(UserError, match=rf"^{told}, so none can be held out; set data.validation_share: 0$"):
        load(path)
    assert len(load(path, validation_share=0).train) == rows


def test_json_and_parquet_read_the_same_rows(tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    rows = [chat_row(str(number)) for number in range(10, 20)]
    for row, arguments in zip(rows, ({"a": 1}, {"b": "x", "c": [{"d": 1}, {"e": 2}]}), strict=False):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        row["messages"].insert(1, {"role": "assistant", "content": "", "tool_calls": [call]})
    (tmp_path / "x.json").write_text(json.dumps(rows))
    parquet.write_table(Table.from_pylist(rows), tmp_path / "x.parquet")
    expected = load(jsonl(tmp_path / "x.jsonl", rows), validation_share=0)
    for kind in ("json", "parquet"):
        assert load(tmp_path / f"x.{kind}", kind, validation_share=0).sha256 == expected.sha256
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match="has type jsonl"):
        load(tmp_path / "x.json", "json")
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "x.json", "parquet")


def test_optional_packages_are_asked_for_by_their_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, kind in (("pyarrow", "parquet"), ("datasets", "hub")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingExtra, match=rf"mrlm\[{kind}\]"):
            load(tmp_path / "x", kind)


def test_a_hub_dataset_is_asked_for_split_and_subset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, subset: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((path, subset, split))
        row = chat_row("1" if split == "train" else "2")
        row["messages"][1]["tool_calls"] = [{"function": {"name": "f", "arguments": {"a": 1, "b": None}}}]
        return [row]

    fake = ModuleType("datasets")
    fake.__dict__.update(SimpleNamespace(load_dataset=load_dataset).__dict__)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    found = of(settings("data", type="hub", path="a/b", subset="c", validation_split="v", test_split="t"), ())
    assert asked == [("a/b", "c", "train"), ("a/b", "c", "v"), ("a/b", "c", "t")]
    assert found.train[0][0].views[AGENT][1].tool_calls == ({"function": {"name": "f", "arguments": {"a": 1}}},)
    assert [said(group)[0][0] for group in (*found.train, *found.validation, *found.test)] == [
        ("user", "sort 1="),
        ("user", "sort 2="),
        ("user", "sort 2="),
    ]
    assert [group[0].task.split for group in (*found.train, *found.validation, *found.test)] == [
        "train",
        "validation",
        "test",
    ]
    with pytest.raises(ValidationError, match="validation_share has no meaning beside validation_split"):
        settings("data", type="hub", path="a/b", validation_split="v", validation_share=0.2)


def test_the_split_is_a_function_of_the_prompt_alone(tmp_path: Path) -> None:
    rows = [chat_row(f"{number:03}") for number in range(400)]
    found = load(jsonl(tmp_path / "x.jsonl", rows), validation_share=0.2)
    held = {said(group)[0][0][1] for group in found.validation}
    assert 0.14 < len(held) / 400 < 0.26
    fewer = load(jsonl(tmp_path / "y.jsonl", rows[200:][::-1]), validation_share=0.2)
    kept = {said(group)[0][0][1] for group in fewer.validation}
    assert kept == held & {row["messages"][0]["content"] for row in rows[200:]}
    other = [{"messages": [row["messages"][0], {"role": "assistant", "content": "x"}]} for row in rows]
    twice = load(jsonl(tmp_path / "z.jsonl", [*rows, *other]), validation_share=0.2)
    assert {said(group)[0][0][1] for group in twice.validation} == held
    assert not held & {said(group)[0][0][1] for group in twice.train}
    tested = {said(group)[0][0][1] for group in found.test}
    assert 0.14 < len(tested) / 400 < 0.26
    assert tested == {said(group)[0][0][1] for group in twice.test}
    assert not tested & (held | {said(group)[0][0][1] for group in twice.train})
    assert {group[0].task.split for group in found.test} == {"test"}
    assert len(found.train) + len(found.validation) + len(found.test) == 400
    uneven = load(tmp_path / "x.jsonl", validation_share=0.2, test_share=0.4)
    assert tested < {said(group)[0][0][1] for group in uneven.test}
    assert {said(group)[0][0][1] for group in uneven.validation} == held
    assert load(tmp_path / "x.jsonl", validation_share=0.2, test_share=0.0).test == ()
    pairs = load(
        jsonl(tmp_path / "p.jsonl", [pair_row(f"{number:03}") for number in range(400)]),
        form="pairs",
        validation_share=0.2,
    )
    assert {said(group)[0][0][1] for group in pairs.validation} == held


def test_few_rows_still_hold_one_out_and_a_file_of_its_own_holds_out_all(tmp_path: Path) -> None:
    path = chats(tmp_path / "x.jsonl", 5)
    few = load(path, validation_share=0.001)
    assert (len(few.train), len(few.validation), len(few.test)) == (3, 1, 1)
    two = load(chats(tmp_path / "two.jsonl", 2))
    assert (len(two.train), len(two.validation), len(two.test)) == (1, 1, 0)
    assert len(load(path, validation_share=0).train) == 5
    apart = load(path, validation_path=str(chats(tmp_path / "y.jsonl", 3)))
    assert (len(apart.train), len(apart.validation), len(apart.test)) == (5, 3, 0)
    apart = load(path, validation_path=str(tmp_path / "y.jsonl"), test_share=0.001)
    assert (len(apart.train), len(apart.validation), len(apart.test)) == (4, 3, 1)
    apart = load(path, test_path=str(tmp_path / "y.jsonl"))
    assert (len(apart.train), len(apart.validation), len(apart.test)) == (4, 1, 3)
    with pytest.raises(UserError, match="same prompt"):
        load(jsonl(tmp_path / "z.jsonl", [chat_row("1")] * 3))


def test_stored_episodes_are_cloned_by_their_reward(tmp_path: Path) -> None:
    recipe = tiny(report={"episodes": 12, "episodes_every": 1}, sampling={"tasks_per_step": 12, "max_new_tokens": 6})
    with trainer(tmp_path / "run", recipe) as made:
        from mrlm_cli.training.loop import iteration

        iteration(made)
    rows = [json.loads(line) for line in (tmp_path / "run/episodes/step-000001.jsonl").read_text().splitlines()]
    whole = [row for row in rows if row["ended"]]
    assert 0 < len(whole) < len(rows), "the test needs cut episodes and whole ones"
    found = load(tmp_path / "run", "episodes", validation_share=0)
    assert len(found.train) == len(whole)
    assert len(found.left_out["the last reply was cut"]) == len(rows) - len(whole)
    bound = sorted(sum(row["rewards"]) for row in whole)[len(whole) // 2]
    best = load(tmp_path / "run", "episodes", min_reward=bound, validation_share=0)
    assert len(best.train) == sum(sum(row["rewards"]) >= bound for row in whole)
    exact = [
        row for row in whole if any(name == "exact" and value >= 1 for *_, name, value in row["transcript"]["rewards"])
    ]
    if exact:
        assert len(load(tmp_path / "run", "episodes", min_reward=1, component="exact").train) == len(exact)
    else:
        with pytest.raises(UserError, match="too little reward"):
            load(tmp_path / "run", "episodes", min_reward=1, component="exact")
    with pytest.raises(UserError, match=r"no episode has a reward component exct; there are: .*exact"):
        load(tmp_path / "run", "episodes", min_reward=-9, component="exct")
    with pytest.raises(ValidationError, match="component says what min_reward speaks of"):
        load(tmp_path / "run", "episodes", component="exact")
    with pytest.raises(UserError, match="is no stored episode"):
        load(chats(tmp_path / "x.jsonl"), "episodes")

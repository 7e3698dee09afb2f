"""mrlm collect: conversations and verified pairs, ready for a recipe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mrlm_cli import api, registry
from mrlm_cli.cli.app import main
from mrlm_cli.data.load import of
from mrlm_cli.errors import UserError
from mrlm_cli.events import Wanted
from mrlm_cli.recipe.compose import dump
from mrlm_cli.records import Episode, Message, Span, Transcript
from mrlm_cli.training.collect import demonstrations, pairs
from mrlm_cli.training.rollout import Draw
from tests.data_helpers import chats
from tests.kit import settings, tiny, trainer

ENVIRONMENT = ["--environment", "sort_digits", "digits=3"]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_oracles_conversations_are_rows_for_sft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["collect", "scripted:oracle", *ENVIRONMENT, "--tasks", "20", "--out", "rows.jsonl"]) == 0
    assert "20 conversations" in capsys.readouterr().err
    found = rows(tmp_path / "rows.jsonl")
    for row in found:
        asked, said = row["messages"]
        assert said == {"role": "assistant", "content": "".join(sorted(asked["content"][5:8]))}
        assert row["components"]["exact"] == 1
    loaded = of(settings("data", type="jsonl", path="rows.jsonl"), ())
    assert len(loaded.train) + len(loaded.validation) + len(loaded.test) == 20
    assert main(["collect", "scripted:oracle", *ENVIRONMENT, "--tasks", "3"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == found[:3]


def test_the_tasks_are_of_the_split_asked_for_and_only_good_episodes_stay(tmp_path: Path) -> None:
    wanted = Wanted(30, 2, "test", component="exact", least=1.0)
    overrides = ["digits=3", "seed=4"]
    found = api.collect("scripted:random", wanted, environment="sort_digits", overrides=overrides)
    everything = api.collect("scripted:random", Wanted(30, 2, "test"), environment="sort_digits", overrides=overrides)
    assert len(everything.rows) == 60
    assert {row["task"].partition("/")[0] for row in everything.rows} == {"test"}
    right = [row for row in everything.rows if row["components"]["exact"] == 1]
    assert 0 < len(right) < 60
    assert list(found.rows) == right
    assert found.left_out == {"earned too little": 60 - len(right)}


def test_a_run_on_data_needs_tasks_and_perhaps_a_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = {"type": "jsonl", "path": str(chats(tmp_path / "rows.jsonl")), "rows_per_step": 8}
    (tmp_path / "sft.yaml").write_text(dump(tiny(data=data, algorithm={"type": "sft"}, steps=1, name="sft")))
    assert main(["train", "sft.yaml"]) == 0
    capsys.readouterr()

    def told(*arguments: str) -> str:
        assert main(["collect", "runs/sft", *arguments]) == 2
        return capsys.readouterr().err

    for overrides in ([], ["sampling.max_new_tokens=8"]):
        assert told(*overrides) == (
            "runs/sft was trained on data and brings no tasks: say which with --environment NAME or --recipe RECIPE\n"
        )
    assert told(*ENVIRONMENT) == (
        "runs/sft was trained on data, which does not say how long a reply may be: add sampling.max_new_tokens=N, less "
        "than its context of 64 tokens\n"
    )
    wanted = Wanted(6, 1, "train")
    found = api.collect("runs/sft", wanted, environment="sort_digits", overrides=["sampling.max_new_tokens=1"])
    (reason,) = (reason for reason in found.left_out if "cut" in reason)
    assert reason == "were cut by a limit (sampling.max_new_tokens is 1)"


def test_a_runs_pairs_are_verified_and_go_into_a_recipe(tmp_path: Path) -> None:
    with trainer(tmp_path / "run", tiny(environments=[{"type": "sort_digits", "digits": 2}])) as made:
        sampled = made._judged.episodes(
            [made.environments["sort_digits"].task("train", index) for index in range(3)],
            4,
            Draw(0, "x", 0, 0),
            1.0,
        )
        environments = dict(made.environments)

    def said(one: Episode, text: str, exact: float, tokens: int, ended: bool = True) -> Episode:
        view = (one.transcript.views["policy"][0], Message("assistant", text))
        transcript = replace(
            one.transcript, views={"policy": view}, rewards=(("policy", 0, "exact", exact),), stop="done"
        )
        spans = tuple(replace(span, end=span.start + tokens) if span.kind == "chosen" else span for span in one.spans)
        return replace(one, transcript=transcript, spans=spans, ended=ended, stop="done", failure=None)

    first, second, third = sampled[:4], sampled[4:8], sampled[8:]
    episodes = [
        said(first[0], "long right", 1.0, 5),
        said(first[1], "right", 1.0, 2),
        said(first[2], "wrong", 0.0, 3),
        said(first[3], "cut wrong", 0.0, 2, ended=False),
        *[said(one, "right", 1.0, 2) for one in second],
        *[said(one, "wrong", 0.0, 2) for one in third],
    ]
    found = pairs(episodes, environments)
    (row,) = found.rows
    assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == ("right", "wrong")
    assert row["prompt"] == [{"role": "user", "content": first[0].transcript.views["policy"][0].content}]
    assert found.left_out == {"tasks of which no answer is wrong": 1, "tasks of which no answer is right": 1}
    assert "1 pairs; left out: 1 tasks of which no answer is wrong" in found.summary("pairs")
    other = replace(first[0].transcript, views={"policy": (Message("user", "another"), Message("assistant", "a"))})
    asked = [said(replace(first[0], transcript=other), "right", 1.0, 2), said(first[1], "wrong", 0.0, 2)]
    assert pairs(asked, environments).left_out == {
        "tasks of which the right and the wrong answers are to different prompts": 1
    }
    cut, broken = said(first[0], "x", 0.0, 2, ended=False), replace(first[1], stop="failed", failure="x")
    assert pairs([cut, broken], environments).left_out == {
        "tasks of which all episodes failed or were cut by a limit": 1
    }
    assert pairs([broken], environments).left_out == {"tasks of which all episodes failed": 1}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    data = settings("data", type="jsonl", path=str(tmp_path / "pairs.jsonl"), form="pairs", validation_share=0.0)
    assert len(of(data, ()).train) == 1
    kept = demonstrations(episodes, None, None)
    assert (len(kept.rows), kept.left_out) == (11, {"were cut by a limit": 1})
    silent = replace(first[0].transcript, views={"policy": first[0].transcript.views["policy"][:1]}, stop="done")
    heard = replace(first[0], transcript=silent, ended=True, stop="done", failure=None)
    assert demonstrations([heard], None, None).left_out == {"said nothing": 1}
    for environment in environments.values():
        environment.declared = lambda config: {"match": 1.0}  # type: ignore[method-assign]
    with pytest.raises(UserError, match="no reward component exact"):
        pairs(episodes, environments)


Answer = tuple[str, float, float | None, int]  # text, exact, format (if the environment has that), tokens


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([("012", 1, None, 3), ("0*2", 0, None, 3), ("0123", 0, None, 4), ("01234", 0, None, 5)], ("012", "0123")),
        ([("It is 12.", 1, None, 5), ("12", 0, None, 5), ("It may be 9.", 0, None, 9)], ("It is 12.", "It may be 9.")),
        ([("12", 1, 1, 3), ("13", 0, 0, 3), ("so 13", 0, 1, 9)], ("12", "so 13")),
        ([("12", 1, None, 3), ("so: 12", 1, None, 6), ("so 9", 0, None, 6), ("none", 0, None, 9)], ("so: 12", "so 9")),
        ([("7 ", 1, None, 2), (" 1234", 0, None, 7), ("8x", 0, None, 2)], ("7 ", " 1234")),
    ],
)
def test_the_sides_of_a_pair_are_alike_in_form_and_then_in_length(
    answers: list[Answer], expected: tuple[str, str]
) -> None:
    environment = registry.resolve("environments", "sort_digits")
    environment = environment(environment.Config(type="sort_digits"))
    task = environment.task("train", 0)

    def episode(sample: int, text: str, exact: float, form: float | None, tokens: int) -> Episode:
        view = (Message("user", "?"), Message("assistant", text))
        paid = [("policy", 0, "exact", exact)] + ([] if form is None else [("policy", 0, "format", form)])
        transcript = Transcript(task, sample, {"policy": view}, tuple(paid), {}, "done")
        spans = (Span(0, 1, "prompt", 0, 0), Span(1, 1 + tokens, "chosen", 0, 0))
        zeros = (0.0,) * (1 + tokens)
        return Episode(
            id=str(sample),
            session=str(sample),
            task=task,
            group=task.id,
            sample=sample,
            agent="policy",
            tokens=(0,) * (1 + tokens),
            spans=spans,
            logprobs=zeros,
            rewards=zeros,
            transcript=transcript,
            stop="done",
            ended=True,
        )

    episodes = [episode(sample, *answer) for sample, answer in enumerate(answers)]
    for order in (episodes, episodes[::-1]):
        (row,) = pairs(order, {"sort_digits": environment}).rows
        assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == expected


def test_a_models_answers_are_collected_with_its_own_recipe_or_another_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(
        "name: r\nsteps: 1\nmodel: {type: scratch, layers: 1, hidden: 32, heads: 2, context: 64}\n"
        "environments: [{type: sort_digits, digits: 2}]\nsampling: {tasks_per_step: 2, max_new_tokens: 30}\n"
        "algorithm: {type: ppo}\nevaluate: {tasks: 2}\nhardware: {threads: 1, device: cpu}\n"
    )
    assert main(["train", "r.yaml"]) == 0
    own = api.collect("runs/r", Wanted(20, 1))
    assert len(own.rows) + own.left_out["were cut by a limit (sampling.max_new_tokens is 30)"] == 20
    assert {row["environment"] for row in own.rows} == {"sort_digits"}
    other = api.collect("runs/r", Wanted(20, 1), environment="arithmetic", overrides=["sampling.temperature=2"])
    assert {row["environment"] for row in other.rows} == {"arithmetic"}
    assert api.collect("runs/r", Wanted(20, 1)) == own


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere", "--tasks", "2"], "brings no tasks: say which with --environment NAME or --recipe RECIPE"),
        (["scripted:oracle", "--tasks", "2"], "scripted:oracle brings no tasks: say which with"),
        (["scripted:oracle", "--environment", "sort_digit"], "did you mean sort_digits?"),
        (["scripted:oracle", "--environment", "sort_digits", "--recipe", "quickstart"], "not of both"),
        (["scripted:oracle", "--recipe", "sft_smoke"], "has no tasks"),
        (["scripted:oracle", *ENVIRONMENT, "--pairs", "--min-reward", "1"], "not for --pairs"),
        (
            ["scripted:oracle", *ENVIRONMENT, "--min-reward", "0", "--component", "exct"],
            "no task here has a reward component exct; there are: ",
        ),
        (["scripted:oracle", *ENVIRONMENT, "--out", "no/x.jsonl"], "there is no directory no"),
        (["scripted:oracle", *ENVIRONMENT, "--split", "dev"], "expected train, validation or test"),
        (["scripted:oracle", "sort_digits"], "expected key=value instead of sort_digits"),
    ],
)
def test_wrong_words_are_answered(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["collect", *words]) == 2
    assert told in capsys.readouterr().err

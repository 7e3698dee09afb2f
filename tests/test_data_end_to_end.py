"""What a person does with data: train, evaluate, go on, check; and what is refused before anything is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mrlm_cli import api
from mrlm_cli.cli.app import main
from mrlm_cli.errors import MrlmError, RecipeError, UserError
from mrlm_cli.metrics import describe
from mrlm_cli.recipe import compose
from tests.data_helpers import chats, jsonl, pair_row

GOOD = """
name: rows
steps: 3
model: {type: scratch, layers: 1, hidden: 32}
data: {type: jsonl, path: rows.jsonl}
algorithm: {type: sft}
"""
SMALL = ["hardware.threads=1"]


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(text: str, *overrides: str) -> str:
    Path("r.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        compose.load("r.yaml", overrides)
    return str(caught.value)


BAD: list[tuple[str, str, str]] = [
    ("steps", "environments: [{type: sort_digits}]\nsteps", "r.yaml:3:15 environments: algorithm sft on data uses"),
    ("steps", "sampling: {temperature: 0.5}\nsteps", "sampling: algorithm sft on data uses no sampling"),
    ("steps", "engine: {type: generate}\nsteps", "engine: algorithm sft on data uses no engine"),
    ("steps", "agents: {a: {type: learner}}\nsteps", "agents: algorithm sft on data uses no agents"),
    ("type: sft", "type: ppo", "data: algorithm ppo learns from environments and uses no data"),
    ("data: {type: jsonl, path: rows.jsonl}", "environments: [{type: sort_digits}]", "learns from data"),
    ("data: {type: jsonl, path: rows.jsonl}\n", "", "data: required, and missing"),
    ("type: sft", "type: dpo", "data.form: got chat; algorithm dpo learns from form pairs"),
    ("rows.jsonl", "rows.jsonl, form: pairs", "data.form: got pairs; algorithm sft learns from form chat or"),
    ("type: jsonl, path: rows.jsonl", "type: episodes, path: runs/x, form: chat", "data.form: unknown key"),
    ("rows.jsonl", "rows.jsonl, pth: x", "data.pth: unknown key for type jsonl; did you mean path?"),
    ("type: jsonl", "type: jsnl", "data.type: no data is called 'jsnl'; did you mean json"),
    ("rows.jsonl", "rows.jsonl, epochs: 2", "steps: steps and data.epochs exclude each other"),
    ("steps: 3\n", "", "steps: required, and missing"),
    ("steps: 3", "steps: 0", "steps: got 0; expected a number of at least 1"),
    ("rows.jsonl", "rows.jsonl, max_tokens: 999", "data.max_tokens: got 999; expected at most model.context = 256"),
    ("steps", "optimizer: {minibatches: 65}\nsteps", "got 65; expected at most the 64 rows of a step"),
    (
        "rows.jsonl",
        "rows.jsonl, validation_path: x.jsonl, validation_share: 0.1",
        "data: validation_share has no meaning",
    ),
    (
        "rows.jsonl",
        "rows.jsonl, test_path: x.jsonl, test_share: 0.1",
        "data: test_share has no meaning beside test_path",
    ),
    ("steps", "evaluate: {temperature: 1.0}\nsteps", "evaluate.temperature: held-out rows of data are not sampled"),
    (
        "data: {type: jsonl, path: rows.jsonl}\nalgorithm: {type: sft}",
        "environments: [{type: sort_digits}]\nalgorithm: {type: dpo}",
        "sampling.episodes_per_task: got 1; algorithm dpo compares the episodes of a task: expected at least 2",
    ),
]


@pytest.mark.parametrize(("old", "new", "told"), BAD, ids=[row[2][:50] for row in BAD])
def test_what_does_not_fit_together_is_refused(old: str, new: str, told: str) -> None:
    text = GOOD.replace(old, new, 1)
    assert text != GOOD
    assert told in refused(text)


def test_a_recipe_with_data_loads_back_as_it_is_written() -> None:
    Path("r.yaml").write_text(GOOD)
    composed = compose.load("r.yaml")
    Path("again.yaml").write_text(compose.dump(composed.recipe))
    assert compose.load("again.yaml").recipe == composed.recipe
    chats(Path("rows.jsonl"))
    assert compose.load("r.yaml").recipe.data.path == str(Path("rows.jsonl").resolve())  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["sft_smoke", "dpo_smoke", "reward_model_smoke"])
def test_a_smoke_recipe_is_trained_evaluated_and_gone_on_with(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    composed = api.load_recipe(name, SMALL)
    run = api.train(composed, plain=True)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    unknown = {metric for row in rows for metric in row if describe(metric) is None}
    assert not unknown, f"metrics that nobody explains: {unknown}"
    steps = compose.load(run / "recipe.yaml").recipe.steps
    assert len(rows) == steps == (15 if name == "sft_smoke" else 12)  # 3 epochs of 77 rows, 16 a step
    found = api.evaluate(str(run))
    last = json.loads((run / f"eval/step-{steps:06}.json").read_text())
    assert (found.step, found.split, found.reward) == (steps, "test", None)
    assert found.tasks > 0
    assert found.components.keys() == last["components"].keys()
    kept = json.loads((run / f"eval/step-{steps:06}-test.json").read_text())
    prompts = [{one["transcript"]["task"]["data"]["place"] for one in each["episodes"]} for each in (kept, last)]
    assert not prompts[0] & prompts[1], "a test row was seen in an evaluation of the run"
    assert main(["eval", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.partition("{")[2].join(["{", ""]))["components"]["loss"]["mean"] > 0
    assert api.train(composed, plain=True, continue_run=True) == run
    api.resume(run, [f"steps={steps + 2}"], plain=True)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == steps + 2
    tasks = api.evaluate(str(run), recipe="ppo_smoke", overrides=[*SMALL, "evaluate.tasks=4"])
    assert tasks.reward is not None
    assert tasks.tasks == 4


def test_a_dry_run_reads_the_rows_and_tells_of_bad_ones(capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.yaml").write_text(GOOD)
    assert main(["train", "r.yaml", "--dry-run"]) == 2
    assert capsys.readouterr().err == "r.yaml:5:27 data.path: there is no file rows.jsonl\n"
    jsonl(Path("rows.jsonl"), [pair_row("21")])
    for words in (["--dry-run"], []):
        assert main(["train", "r.yaml", *words]) == 2
        assert (
            "rows.jsonl:1: column messages is missing: the row has prompt, chosen, rejected" in capsys.readouterr().err
        )
    assert not Path("runs").exists()
    with chats(Path("rows.jsonl"), 30).open("a") as file:
        file.write("{}\n")
    overrides = ["data.bad_rows=exclude", "data.validation_share=0.2"]
    assert main(["train", "r.yaml", "--dry-run", *overrides]) == 0
    out = capsys.readouterr().out
    assert "data: 1 row left out, column messages is missing: " in out
    assert "rows.jsonl:31" in out
    assert "rows of data (" in out


def test_what_cannot_be_judged_is_said() -> None:
    Path("r.yaml").write_text(GOOD)
    chats(Path("rows.jsonl"), 10)
    run = api.train(api.load_recipe("r.yaml", ["data.validation_share=0", *SMALL]), plain=True)
    assert list((run / "eval").iterdir()) == []
    with pytest.raises(UserError, match="keeps no rows for a test"):
        api.evaluate(str(run))
    with pytest.raises(UserError, match="is no run or checkpoint"):
        api.evaluate(str(run / "checkpoints/latest/policy"), recipe="r.yaml")
    chats(Path("rows.jsonl"), 11)
    with pytest.raises(MrlmError, match="have changed since the run began"):
        api.resume(run, ["steps=5"], plain=True)

"""What goes wrong for a newcomer is told in a few lines that name the place, and costs nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mrlm_cli import api, blame
from mrlm_cli.cli.app import main
from mrlm_cli.data.load import of
from mrlm_cli.envs.host import Host, NoJournal
from mrlm_cli.envs.troubles import Troubles, trace
from mrlm_cli.errors import CheckpointError, MrlmError, ScoringError, UserError
from mrlm_cli.records import Message, Task, Transcript
from mrlm_cli.registry import resolve
from mrlm_cli.rewards.firewall import Scorers
from mrlm_cli.training.journal import Journal
from mrlm_cli.training.rundir import RunDirectory
from tests.data_helpers import chat_row, jsonl
from tests.kit import settings

RECIPE = """
name: mine
steps: 2
model: {type: scratch, layers: 1, hidden: 32, heads: 2, context: 64}
environments: [{type: sort_digits, digits: 3}]
sampling: {tasks_per_step: 8, max_new_tokens: 4}
algorithm: {type: ppo}
evaluate: {every: 0, tasks: 4}
hardware: {threads: 1, worker_processes: 1}
"""
BROKEN = """
import json
from mrlm_cli.envs.sort_digits import SortDigits


class Mine(SortDigits):
    def open(self, task, seed):
        return look(task)


def look(task):
    return json.loads("{" + task.id)
"""


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def train(text: str, *overrides: str) -> Path:
    Path("mine.yaml").write_text(text)
    return api.train(api.load_recipe("mine.yaml", overrides), plain=True)


def test_an_exception_of_ones_own_environment_is_short_and_kept_whole(tmp_path: Path, capfd) -> None:
    (tmp_path / "env.py").write_text(BROKEN)
    own = "environments.0={type: './env.py:Mine', digits: 3, max_failed: 0.1}"
    with pytest.raises(ScoringError, match=r"JSONDecodeError.*\(env.py:12\)"):
        train(RECIPE, own)
    told = capfd.readouterr().err.splitlines()
    assert [line for line in told if "JSONDecodeError" in line and line.startswith("environment worker")] == [told[0]]
    assert told[1:4] == [
        f"  {tmp_path}/env.py:8 in open: return look(task)",
        f'  {tmp_path}/env.py:12 in look: return json.loads("{{" + task.id)',
        "  the whole traceback is in runs/mine/tracebacks.txt",
    ]
    kept = Path("runs/mine/tracebacks.txt").read_text()
    assert "Traceback (most recent call last)" in kept
    assert "decoder.py" in kept

    # Nothing was trained, so the same command works once the environment is mended.
    assert Path("runs/mine/metrics.jsonl").read_text() == ""
    run = train(RECIPE, "environments.0.type=sort_digits")
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert not (run / "tracebacks.txt").exists()
    assert "ended before its first step" in (run / "warnings.jsonl").read_text()
    with pytest.raises(UserError, match="exists already; go on with it: mrlm resume runs/mine"):
        train(RECIPE)


def test_a_traceback_with_half_a_character_is_kept(tmp_path: Path) -> None:
    """JSON that a policy writes may hold one, and a person's exception may quote it."""
    kept = Journal(tmp_path / "journal.jsonl").keep_traceback("ValueError: no \ud800\n")
    assert kept is not None
    assert kept.read_text() == "ValueError: no \\ud800\n"


def test_the_whole_traceback_is_shown_with_debug_and_each_exception_once(capsys, monkeypatch) -> None:
    kept: list[str] = []

    def keep(text: str) -> None:
        kept.append(text)

    def found(text: str) -> Mapping[str, Any]:
        try:
            json.loads(text)
        except ValueError as error:
            return trace(error)
        raise AssertionError

    troubles = Troubles(keep)
    for text in ("{", "{", "["):
        troubles.tell("worker 0", found(text))
    assert len(kept) == 2
    told = capsys.readouterr().err
    assert told.count("test_newcomers.py") == 4  # the place of each, and its one line
    assert told.count("--debug prints the whole traceback") == 2
    assert "decoder.py" not in told
    monkeypatch.setattr(blame, "debug", True)
    troubles.tell("worker 0", found('"'))
    assert "decoder.py" in capsys.readouterr().err


def test_an_exception_of_ones_own_reward_is_told_as_well(tmp_path: Path, capfd) -> None:
    (tmp_path / "score.py").write_text("def score(transcript):\n    return {}['nothing']\n")
    owner = resolve("rewards", "function")
    config = owner.Config(type="function", path="./score.py:score")
    view = (Message("user", "?"), Message("assistant", "!"))
    one = Transcript(Task("0", "e", "train", 0, {}), 0, {"policy": view}, (), {}, "done")
    with Scorers([config], folders=[tmp_path], workers=1, journal=NoJournal()) as scorers:
        (outcomes,) = scorers.score([("0", one)])
    assert outcomes["function"].text == "KeyError: 'nothing' (score.py:2)"  # type: ignore[union-attr]
    assert f"{tmp_path}/score.py:2 in score: return {{}}['nothing']" in capfd.readouterr().err


def test_a_bug_in_an_environment_of_this_process_is_told(monkeypatch, capsys) -> None:
    owner = resolve("environments", "sort_digits")

    def broken(self: Any, task: Task, seed: int) -> None:
        raise RuntimeError("what")

    monkeypatch.setattr(owner, "open", broken)
    config = owner.Config(type="sort_digits")
    with Host([config], folders=[], workers=1, deadline=1.0, journal=NoJournal()) as host:
        host.collect(host.open([("0", host.environments["sort_digits"].task("train", 0), 0)]))
    assert "in broken: raise RuntimeError" in capsys.readouterr().err


def test_prompts_none_of_which_fits_are_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none of the first 8 tasks leaves room.*has 9 tokens.*in 8\. Raise sampling"):
        train(RECIPE, "sampling.max_tokens=8")
    rows = jsonl(tmp_path / "rows.jsonl", [chat_row("123456789" * 3 + str(number)) for number in range(12)])
    on_data = f"""
name: rows
steps: 3
model: {{type: scratch, layers: 1, hidden: 32, heads: 2, context: 32}}
data: {{type: jsonl, path: {rows}, rows_per_step: 4}}
algorithm: {{type: sft}}
hardware: {{threads: 1}}
"""
    with pytest.raises(UserError, match=r"none of the \d+ training rows.*rows\.jsonl:\d+: 6\d tokens.*raise data"):
        train(on_data)


def test_prompts_some_of_which_do_not_fit_are_counted_and_named() -> None:
    both = "environments=[{type: sort_digits, digits: 3}, {type: sort_digits, name: long, digits: 9}]"
    run = train(RECIPE, both, "sampling.max_tokens=14")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["excluded_rate"] < 1 for row in rows)
    warned = [json.loads(line)["text"] for line in (run / "warnings.jsonl").read_text().splitlines()]
    (evaluated,) = [text for text in warned if text.startswith("evaluation at step 0")]
    assert "2 of 4 tasks are left out, such as long" in evaluated
    (told,) = [text for text in warned if text.startswith("step ")]
    assert f"{round(rows[0]['excluded_rate'] * 8)} of 8 tasks are left out, such as long train" in told
    assert "has 15 tokens and leaves no room in 14" in told


def test_a_run_that_is_held_is_not_replaced(tmp_path: Path) -> None:
    held = RunDirectory.create(tmp_path / "runs" / "mine", recipe_yaml="name: mine\n", origins={}, machine={})
    with held.lock(), pytest.raises(MrlmError, match="in use"):
        train(RECIPE)
    again = RunDirectory.create(held.path, recipe_yaml="name: again\n", origins={}, machine={})
    assert (again.replaced, held.replaced) == (True, False)
    with pytest.raises(MrlmError, match="replaced by another process"), held.lock():
        pass
    assert again.recipe_yaml() == "name: again\n"
    assert [path.name for path in held.path.parent.iterdir()] == ["mine"]


def test_a_run_with_a_trained_checkpoint_is_not_replaced_though_its_metrics_are_gone(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "runs" / "mine", recipe_yaml="name: mine\n", origins={}, machine={})
    (run.checkpoints / "step-000000").mkdir(parents=True)  # a signal came before the first step
    RunDirectory.refuse_existing(run.path)
    (run.checkpoints / "step-000004").mkdir()
    with pytest.raises(UserError, match="exists already"):
        RunDirectory.refuse_existing(run.path)


def test_a_stored_recipe_without_a_key_takes_its_default(tmp_path: Path) -> None:
    """A run of an older version goes on; where the default would change its rows, that is told with the way out."""
    rows = jsonl(tmp_path / "rows.jsonl", [chat_row(str(number)) for number in range(60)])
    text = f"""
name: old
steps: 2
model: {{type: scratch, layers: 1, hidden: 32, heads: 2, context: 64}}
data: {{type: jsonl, path: {rows}, rows_per_step: 4, test_share: 0}}
algorithm: {{type: sft}}
evaluate: {{every: 0, tasks: 2}}
hardware: {{threads: 1}}
"""
    run = train(text)
    recipe = run / "recipe.yaml"
    written = recipe.read_text()

    def without(*keys: str) -> str:
        return "".join(line for line in written.splitlines(True) if not line.strip().startswith(keys))

    recipe.write_text(without("max_refused:", "bad_rows:", "gradient_checkpointing:", "episodes_every:"))
    assert recipe.read_text().count("\n") == written.count("\n") - 4
    api.resume(run, ["steps=3"], plain=True)
    assert "max_refused: 5" in recipe.read_text()
    recipe.write_text(without("test_share:"))
    with pytest.raises(CheckpointError, match=r"write test_share: 0 into its recipe\.yaml"):
        api.resume(run, ["steps=4"], plain=True)
    recipe.write_text(without("test_share:").replace("\n  rows_per_step", "\n  test_share: 0\n  rows_per_step"))
    api.resume(run, ["steps=4"], plain=True)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_run_whose_checkpoints_are_all_broken_is_not_begun_anew_over_its_records(tmp_path: Path) -> None:
    run = train(RECIPE)
    rows = (run / "metrics.jsonl").read_bytes()
    for state in run.glob("checkpoints/step-*/state.json"):
        state.write_bytes(state.read_bytes() + b" ")
    with pytest.raises(CheckpointError, match=r"none of its checkpoints is whole \(step-000002 is the newest\)"):
        api.resume(run, ["steps=3"], plain=True)
    assert (run / "metrics.jsonl").read_bytes() == rows


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    assert main([*words]) == code
    return capsys.readouterr().err


def test_what_was_collected_is_not_overwritten_and_an_empty_file_not_written(capsys) -> None:
    words = ["collect", "scripted:oracle", "--environment", "sort_digits", "digits=3", "--tasks", "3"]
    assert main([*words, "--out", "rows.jsonl"]) == 0
    before = Path("rows.jsonl").read_bytes()
    assert "rows.jsonl: exists already" in said(capsys, *words, "--samples", "2", "--out", "rows.jsonl")
    assert Path("rows.jsonl").read_bytes() == before
    told = said(capsys, *words, "--pairs", "--out", "pairs.jsonl")
    assert told == "0 pairs; left out: 3 tasks of which no answer is wrong; nothing is written\n"
    assert not Path("pairs.jsonl").exists()


def test_going_on_with_another_recipe_is_told_by_its_settings(capsys) -> None:
    run = train(RECIPE)
    Path("mine.yaml").write_text(RECIPE + "optimizer: {lr: 0.5, betas: [0.1, 0.2]}\n")
    told = said(capsys, "train", "mine.yaml", "steps=9", "--continue")
    assert f"{run} holds a run of another recipe (steps: 2 there, 9 here; optimizer.lr: " in told
    assert " there, 0.5 here; optimizer.betas: " in told
    assert f"mrlm resume {run}" in told
    told = said(capsys, "train", "mine.yaml", "seed=9", "steps=9", "--continue")
    assert "optimizer.betas" not in told
    assert "; …)" in told


def test_a_dry_run_tells_what_going_on_would(capsys) -> None:
    run = train(RECIPE, "steps=3", "checkpoint.every=1", "checkpoint.keep=2")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "lock"}
    same = ["train", "mine.yaml", "steps=3", "checkpoint.every=1", "checkpoint.keep=2", "--continue"]
    for change in ("seed=9", "optimizer.lr=0.5", "hardware.threads=2"):
        real, dry = (said(capsys, *same, change, *more) for more in ([], ["--dry-run"]))
        assert "holds a run of another recipe" in dry
        assert dry == real
    with RunDirectory(run).lock():
        assert "trains in it" in said(capsys, *same, "--dry-run", code=1)
    for done, told in ((3, "is at its end"), (2, "goes on from step 2")):
        assert main([*same, "--dry-run"]) == 0
        assert f"runs/mine holds a run of this recipe, which {told}\n" in capsys.readouterr().out
        (run / "checkpoints" / f"step-{done:06}" / "state.json").write_text("broken")
    real, dry = (said(capsys, *same, *more, code=1) for more in ([], ["--dry-run"]))
    assert "none of its checkpoints is whole" in dry
    assert real.endswith(dry)  # after the warnings that name the broken ones
    for path, content in before.items():
        assert path.name == "state.json" or path.read_bytes() == content


def test_a_run_from_before_a_setting_was_there_is_gone_on_with(capsys) -> None:
    run = train(RECIPE)
    stored = (run / "recipe.yaml").read_text().splitlines(keepends=True)
    older = [line for line in stored if not line.startswith(("  native:", "  precision:"))]
    assert len(older) == len(stored) - 2
    (run / "recipe.yaml").write_text("".join(older))
    assert api.train(api.load_recipe("mine.yaml"), continue_run=True, plain=True) == run
    for given, told in (("precision=bfloat16", "precision: float32"), ("native=true", "native: null")):
        said_here = f"(hardware.{told} there, {given.partition('=')[2]} here)"
        assert f"{run} holds a run of another recipe {said_here}" in said(
            capsys, "train", "mine.yaml", f"hardware.{given}", "--continue"
        )


@pytest.mark.parametrize(("name", "meant"), [("PPO", "ppo"), ("grop", "grpo"), ("lroo", "rloo")])
def test_a_misspelt_name_is_known_again(name: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"did you mean {meant}\\?"):
        resolve("algorithms", name)


def test_a_directory_without_a_model_is_wrong_input(tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no model" in said(capsys, "export", "empty", "made")


def test_rows_of_another_form_or_file_type_are_recognised(tmp_path: Path) -> None:
    pairs = [{"prompt": f"q{n}", "chosen": "a", "rejected": "b"} for n in range(4)]
    replies = [{"prompt": f"q{n}", "completion": "a"} for n in range(4)]
    for rows, hint in (
        (pairs, "set data.form=pairs, whose columns they have"),
        (replies, "set data.form=completion, whose columns they have"),
        ([*pairs, *replies], "say in data.columns how they are called"),
        ([{"text": "a"}] * 2, "say in data.columns how they are called"),
        ([{"conversations": chat_row("a")["messages"], "id": 1}] * 2, "set data.columns.messages=conversations"),
        ([{name: chat_row("a")["messages"] for name in "ab"}] * 2, "say in data.columns how they are called"),
    ):
        with pytest.raises(UserError, match=hint):
            of(settings("data", type="jsonl", path=str(jsonl(tmp_path / "rows.jsonl", rows))), ())
    (tmp_path / "list.jsonl").write_text(json.dumps([chat_row("a")] * 3, indent=1))
    with pytest.raises(UserError, match=r"list\.jsonl is one JSON list, not an object a line; data\.type=json reads"):
        of(settings("data", type="jsonl", path=str(tmp_path / "list.jsonl")), ())


def test_a_dry_run_tells_how_often_rows_are_read(tmp_path: Path, capsys) -> None:
    jsonl(tmp_path / "rows.jsonl", [chat_row(f"{n}") for n in range(10)])
    data = "data: {type: jsonl, path: rows.jsonl, rows_per_step: 5, validation_share: 0}\nalgorithm: {type: sft}\n"
    model = "model: {type: scratch, layers: 1, hidden: 32, context: 64}\n"
    Path("rows.yaml").write_text(f"name: rows\nsteps: 7\n{model}{data}evaluate: {{every: 0}}\n")
    assert main(["train", "rows.yaml", "--dry-run"]) == 0
    assert "sft on 10 rows of data (0 held out, 0 for the test), each read 3.5 times, for 7" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["play"], ["collect", "scripted:oracle", "--environment"]])
def test_an_unknown_environment_on_the_command_line_is_told_without_a_place(command: list[str], capsys) -> None:
    assert said(capsys, *command, "gues") == "no environment is called 'gues'; did you mean guess?\n"

"""The command line: exit codes, one paragraph for every error, the right form for what was meant."""

# ruff: noqa: E501 - a row of the table is one line

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mrlm_cli import api
from mrlm_cli.cli.app import app, main
from mrlm_cli.errors import Interrupted, MrlmError, NonFiniteError, RunDirectoryError
from mrlm_cli.events import Estimate, Evaluation
from mrlm_cli.recipe import compose, extras
from tests.test_recipe_bad_input import GOOD

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in a folder with small.yaml: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(GOOD)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """What the heavy commands were asked to do, in place of doing it."""
    found: list[tuple[Any, dict[str, Any]]] = []
    evaluation = Evaluation(
        checkpoint="runs/small/checkpoints/step-000010",
        step=10,
        split="test",
        tasks=8,
        failed=1,
        reward=Estimate(0.5, 0.4, 0.6),
        components={"exact": Estimate(0.25, 0.1, 0.4)},
        pass_at={4: 0.75},
        length=6.5,
        truncated=0.125,
        seconds=1.0,
    )

    def record(*arguments: Any, **keywords: Any) -> Any:
        found.append((arguments, keywords))
        return evaluation

    for name in ("train", "resume", "evaluate"):
        monkeypatch.setattr(api, name, record)
    return found


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "small.yaml", "--steps", "10"], "--steps is no option; settings are given as key=value: mrlm train … steps=10"),
        (["train", "small.yaml", "--lr=3"], "--lr is no option; settings are given as key=value: mrlm train … optimizer.lr=3"),
        (["train", "small.yaml", "--optimizer.lr", "3"], "mrlm train … optimizer.lr=3"),
        (["train", "--steps", "10", "small.yaml"], "mrlm train … steps=10"),
        (["train", "small.yaml", "--batch-size", "8"], "mrlm train has no option --batch-size; see mrlm train --help"),
        (["train", "--config", "small.yaml"], "the recipe is an argument: mrlm train small.yaml"),
        (["train", "-c", "small.yaml"], "the recipe is an argument: mrlm train small.yaml"),
        (["train", "small.yaml", "--run_dir", "x"], "mrlm train has no option --run_dir; did you mean --run-dir?"),
        (["train", "small.yaml", "--dryrun"], "did you mean --dry-run?"),
        (["show", "small.yaml", "--lr", "1"], "mrlm show … optimizer.lr=1"),
        (["validate", "--config", "small.yaml"], "the recipe is an argument: mrlm validate small.yaml"),
        (["eval", "runs/x", "--temperature", "1"], "key=value: mrlm eval … sampling.temperature=1"),
        (["resume", "--steps", "10"], "key=value: mrlm resume … steps=10"),
        (["train", "small.yaml", "lr=3"], "override lr=3: unknown key; did you mean optimizer.lr?"),
        (["train", "small.yaml", "other.yaml"], "a second file is given as --overlay other.yaml"),
        (["train", "small.yaml", "--overlay", "none.yaml"], "there is no overlay none.yaml"),
        (["train", "smal.yaml"], "there is no recipe smal.yaml; did you mean small.yaml?"),
        (["train", "../x"], "there is no recipe ../x"),
        (["train", "small.yaml", "name=../x"], "expected the name of a directory"),
        (["train", "small.yaml", "model={type: pretrained, path: models/smollm2-135m}", "--dry-run"], "unknown key for type pretrained"),
        (["train"], "Missing parameter: recipe; see mrlm train --help"),
        (["validate", "lr=3"], "expected a recipe"),
        (["eval", "runs/x", "small.yaml"], "mrlm eval runs/x --recipe RECIPE"),
        (["trian"], "mrlm has no command trian; did you mean train?"),
        (["frobnicate"], "mrlm has no command frobnicate; see mrlm --help"),
        (["--frobnicate"], "No such option: --frobnicate; see mrlm --help"),
        (["info", "--frobnicate"], "No such option: --frobnicate; see mrlm info --help"),
        (["train", "small.yaml", "--run-dir", "--dry-run"], "expected a path, got the flag --dry-run"),
        (["train", "small.yaml", "--overlay", "--plain"], "expected a path, got the flag --plain"),
        (["explain", "coef"], "nothing is called coef"),
        (["explain", "optimizer.lrr"], "did you mean optimizer.lr?"),
        (["explain", "approx_k"], "did you mean approx_kl?"),
        (["explain", "."], "nothing is called ."),
        (["list", "recipe"], "did you mean recipes?"),
        (["fetch", "nothing"], "no model is called 'nothing'; there are: smollm2-135m"),
        (["resume", "nowhere"], "there is no run directory nowhere"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_paragraph_and_exit_2(run: Run, arguments: list[str], told: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert told in err
    assert "Traceback" not in err
    assert "\n\n" not in err


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (NonFiniteError("five in a row"), 1, "five in a row\n"),
        (RunDirectoryError("locked"), 1, "locked\n"),
        (Interrupted(2, "saved"), 130, "saved\n"),
        (Interrupted(15, "saved"), 143, "saved\n"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 1, "No space left on device: runs/x\n"),
        (OSError(errno.EROFS, "Read-only file system"), 1, "Read-only file system\n"),
    ],
)
def test_errors_become_exit_codes(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, told: str
) -> None:
    def fails(*arguments: Any, **keywords: Any) -> None:
        raise error

    monkeypatch.setattr(api, "train", fails)
    assert run("train", "small.yaml") == (code, "", told)
    for debugging in (("--debug", "train", "small.yaml"), ("train", "small.yaml", "--debug")):
        found, _, err = run(*debugging)
        assert found == code
        assert err.startswith("Traceback")
        assert err.endswith(told)


def test_an_unexpected_error_says_in_whose_code_it_arose(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any, **keywords: Any) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(api, "train", fails)
    code, _, err = run("train", "small.yaml")
    assert code == 1
    assert re.fullmatch(r"ZeroDivisionError: oh \(test_cli.py:\d+ in fails; --debug shows the whole traceback\)\n", err)
    monkeypatch.setattr(api, "train", len)
    assert "(a bug in mrlm or in a plugin; --debug shows the whole traceback)" in run("train", "small.yaml")[2]


def test_a_keyboard_interrupt_exits_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*arguments: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "train", stopped)
    assert run("train", "small.yaml") == (130, "", "stopped\n")


def test_mrlm_errors_all_have_an_exit_code() -> None:
    def below(kind: type[MrlmError]) -> list[type[MrlmError]]:
        return [kind, *(inner for child in kind.__subclasses__() for inner in below(child))]

    assert {kind.exit_code for kind in below(MrlmError)} == {1, 2}


def test_train_passes_on_what_it_was_given(run: Run, calls: list[Any], tmp_path: Path) -> None:
    (tmp_path / "over.yaml").write_text("seed: 5\n")
    arguments = ["optimizer.lr=1e-4", "--run-dir", "here", "--continue", "--plain", "--overlay", "over.yaml"]
    assert run("train", "small.yaml", *arguments)[0] == 0
    ((composed,), keywords) = calls[0]
    assert (composed.recipe.optimizer.lr, composed.recipe.seed) == (1e-4, 5)
    assert keywords == {"run_dir": Path("here"), "continue_run": True, "plain": True}
    assert run("train", "small.yaml")[0] == 0
    assert calls[1][1] == {"run_dir": Path("runs/small"), "continue_run": False, "plain": False}


@pytest.mark.parametrize(
    ("arguments", "place", "overrides"),
    [
        ([], None, []),
        (["runs/x"], Path("runs/x"), []),
        (["steps=20"], None, ["steps=20"]),
        (["runs/a=b", "steps=20", "evaluate.every=5"], Path("runs/a=b"), ["steps=20", "evaluate.every=5"]),
    ],
)
def test_resume_tells_a_run_from_an_override(
    run: Run, calls: list[Any], arguments: list[str], place: Path | None, overrides: list[str]
) -> None:
    assert run("resume", *arguments)[0] == 0
    assert calls == [((place, overrides), {"plain": False})]


def test_the_last_word_of_one_setting_alone_is_enough(run: Run) -> None:
    assert run("explain", "gamma") == run("explain", "algorithm.gamma")


def test_an_unfinished_environment_is_the_users_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "env.py").write_text(
        "from mrlm_cli.envs.base import Environment\nclass Mine(Environment):\n    components = {'exact': 1.0}\n"
    )
    text = (tmp_path / "small.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text.replace("type: sort_digits", 'type: "./env.py:Mine"'))
    code, _, err = run("validate", "mine.yaml")
    assert code == 2
    assert "class Mine is not finished; it has yet to write open, size, task" in err
    (tmp_path / "mine.yaml").write_text(text.replace("type: sort_digits", 'type: "./env.py"'))
    assert "write" in run("validate", "mine.yaml")[2]


def test_eval_prints_data_or_words(run: Run, calls: list[Any]) -> None:
    code, out, _ = run("eval", "runs/small", "evaluate.tasks=8", "--best", "--json", "--recipe", "small.yaml")
    assert code == 0
    assert calls == [(("runs/small",), {"recipe": "small.yaml", "overrides": ["evaluate.tasks=8"], "best": True})]
    data = json.loads(out)
    assert data["components"]["exact"] == {"mean": 0.25, "low": 0.1, "high": 0.4}
    assert (data["split"], data["tasks"], data["pass_at"], data["truncated"]) == ("test", 8, {"4": 0.75}, 0.125)
    _, out, _ = run("eval", "runs/small")
    assert "exact                0.250  95 % interval 0.100 to 0.400" in out
    assert "8 held-out tasks of split test" in out
    assert "1 episodes left out" in out


def test_validate_checks_several_files(run: Run, tmp_path: Path) -> None:
    (tmp_path / "part.yaml").write_text("hardware: {threads: 1}\n")
    code, out, _ = run("validate", "small.yaml", "part.yaml", "quickstart", "hardware.threads=2")
    assert (code, out.splitlines()) == (
        0, ["small.yaml: a valid recipe", "part.yaml: a valid fragment: hardware", "quickstart: a valid recipe"]
    )  # fmt: skip
    (tmp_path / "part.yaml").write_text("hardware: {threads: 0}\n")
    (tmp_path / "other.yaml").write_text(GOOD.replace("clip:", "clp:"))
    code, out, err = run("validate", "small.yaml", "part.yaml", "other.yaml")
    assert (code, out) == (2, "small.yaml: a valid recipe\n")
    assert err.splitlines() == [
        "part.yaml:1:21 hardware.threads: got 0; expected a number of at least 1",
        "other.yaml:10:3 algorithm.clp: unknown key for type ppo; did you mean clip?",
    ]


def test_show_says_where_each_value_comes_from(run: Run) -> None:
    code, out, _ = run("show", "small.yaml", "optimizer.lr=1e-4")
    assert code == 0
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    assert lines["optimizer.lr"] == ["0.0001", "override"]
    assert lines["sampling.tasks_per_step"] == ["8", "small.yaml:7"]
    assert lines["seed"] == ["0", "default"]
    assert "  parameters of the policy           12,160" in out  # 57 x 32 + 4 x 32^2 + 3 x 32 x 64 + 3 x 32
    data = json.loads(run("show", "small.yaml", "optimizer.lr=1e-4", "--json")[1])
    assert data["recipe"]["optimizer"]["lr"] == 1e-4
    assert data["origins"]["optimizer.lr"] == "override"
    assert data["derived"]["policy_parameters"] == 12160
    assert data["derived"]["optimizer_steps"] == 20


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("optimizer.lr", ["Peak learning rate.", "number above 0, at most 1", "1e-05"]),
        ("optimizer", ["AdamW", "lr, schedule"]),
        ("steps", ["Iterations", "at least 1", "data.epochs"]),
        ("model.hidden", ["type scratch", "128"]),
        ("model.value.trunk_gradient", ["type scratch, pretrained", "number of at least 0, at most 1"]),
        ("environments.digits", ["type sort_digits", "type arithmetic"]),
        ("environments.0.digits", ["type sort_digits"]),
        ("algorithm.ppo.clip", ["type ppo", "[0.2, 0.2]"]),
        ("algorithm.kl.coef", ["type ppo"]),
        ("engine.slots", ["type cached"]),
        ("approx_kl", ["formula  mean((ρ − 1) − log ρ)", "below 0.05"]),
        ("reward/sort_digits/exact", ["component"]),
        ("ppo", ["algorithms", "clip"]),
    ],
)
def test_explain(run: Run, key: str, words: list[str]) -> None:
    code, out, _ = run("explain", key)
    assert code == 0
    assert all(word in out for word in words), out
    (first, *_) = json.loads(run("explain", key, "--json")[1])
    assert first["kind"] in ("setting", "metric", "algorithms")


def test_every_setting_and_metric_can_be_explained(run: Run) -> None:
    from mrlm_cli.cli.explaining import explained
    from mrlm_cli.metrics import METRICS
    from mrlm_cli.recipe import explain

    for key in [*compose.values(compose.load("quickstart").recipe), *METRICS, *explain.paths()]:
        assert explained(key)[0].text.startswith(key.replace(".0.", ".")), key


def test_one_kind_of_environment_is_asked_for_by_its_type(run: Run) -> None:
    _, both, _ = run("explain", "environments.digits")
    _, one, _ = run("explain", "environments.arithmetic.digits")
    assert "sort_digits" in both
    assert "sort_digits" not in one
    assert "type arithmetic" in one


def test_list_names_everything_and_runs(run: Run, tmp_path: Path) -> None:
    found = json.loads(run("list", "--json")[1])
    assert set(found) == {
        "recipes",
        "fragments",
        "environments",
        "rewards",
        "algorithms",
        "data",
        "engines",
        "metrics",
        "runs",
    }
    assert "ppo" in found["algorithms"]
    assert "hardware/cpu" in found["fragments"]
    assert found["recipes"]["quickstart"].startswith("PPO from scratch")
    assert all(sentence for rows in found.values() for sentence in rows.values())
    assert run("list", "runs")[1] == "runs: none\n"
    place = tmp_path / "runs" / "small"
    (place / "eval").mkdir(parents=True)
    (place / "recipe.yaml").write_text(GOOD)
    assert json.loads(run("list", "runs", "--json")[1]) == {"runs": {"runs/small": "step 0"}}
    (place / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "rew')  # a writer was killed
    (place / "eval" / "step-000002.json").write_text('{"components": {"exact": {"mean": 0.5}}}')
    assert json.loads(run("list", "runs", "--json")[1]) == {"runs": {"runs/small": "step 2, held-out exact 0.500"}}


def test_a_dry_run_checks_and_does_nothing(run: Run, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = run("train", "small.yaml", "--dry-run")
    assert code == 0
    assert "ppo on sort_digits for 10 steps, into runs/small" in out
    assert "nothing was built" in out
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "runs" / "small").mkdir(parents=True)
    code, _, err = run("train", "small.yaml", "--dry-run")
    assert (code, err) == (
        2,
        "runs/small exists already and is not a run directory; choose another name or --run-dir\n",
    )
    for words in (["--dry-run"], ["--plain"]):
        code, _, err = run("train", "small.yaml", "--continue", *words)
        assert (code, err.partition(":")[0]) == (2, "runs/small is not a run directory")
    (tmp_path / "runs" / "small").rmdir()
    assert run("train", "small.yaml", "--dry-run", "--continue")[0] == 0


@pytest.mark.parametrize(
    ("path", "told", "later"),
    [
        ("models/smollm2-135m", "there is no model at models/smollm2-135m; bring it by: mrlm fetch smollm2-135m", True),
        ("runs/other", "there is no model at runs/other; mrlm list runs names those that are there", True),
        ("runs/sort_sft", "there is no model at runs/sort_sft; mrlm train sort_sft makes it", True),
        ("./here", "there is no model at here", False),
        ("models/other", "there is no model at models/other", False),
        ("/nowhere/at/all", "there is no model at /nowhere/at/all", False),
        ("here/model.gguf", "there is no model at here/model.gguf", False),
        ("./small.yaml", "small.yaml is a file; a model is a directory with config.json and .safetensors", False),
        ("./empty", "empty holds no model: it has no config.json", False),
        ("someone/some-model", "", False),
    ],
)
def test_a_model_that_is_not_there(run: Run, tmp_path: Path, path: str, told: str, later: bool) -> None:
    section = "{type: scratch, layers: 1, hidden: 32}"
    (tmp_path / "empty").mkdir()
    (tmp_path / "big.yaml").write_text(GOOD.replace(section, f"{{type: pretrained, path: {path}}}"))
    code, out, err = run("validate", "big.yaml")
    place = "big.yaml:3:33 model.path: "
    if later:  # another command makes it
        assert (code, out, err) == (0, f"big.yaml: a valid recipe\n  not here yet: {place}{told}\n", "")
    else:
        assert code == (2 if told else 0)
        assert told in err
    for command in (["--dry-run"], []) if told else (["--dry-run"],):
        code, _, err = run("train", "big.yaml", *command)
        assert code == (2 if told else 0)
        assert told in err
        assert err.startswith(place if told else "")


def test_info_is_complete(run: Run) -> None:
    facts = json.loads(run("info", "--json")[1])
    assert facts["cpus"] >= 1
    assert facts["memory_mib"] > 100
    assert set(facts["extras"]) == set(extras.MODULES)
    assert Path(facts["recipes"]).is_dir()
    assert facts["c compiler"]
    assert "python" in run("info")[1]


def test_help_and_version(run: Run) -> None:
    code, out, _ = run("--version")
    assert (code, out.split()[0]) == (0, "mrlm")
    plain = run()
    assert plain[0] == 0
    for command in app.registered_commands:
        assert command.name is not None
        assert command.name in plain[1]
        assert run(command.name, "--help")[0] == 0


def test_a_terminal_without_unicode_and_a_closed_pipe(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(compose.__file__).parents[2])}
    command = [sys.executable, "-m", "mrlm_cli", "explain", "approx_kl"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0
    assert "\\u03c1" in done.stdout
    writer = subprocess.Popen(
        [sys.executable, "-m", "mrlm_cli", "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    assert writer.stdout is not None
    writer.stdout.close()
    assert writer.stderr is not None
    assert writer.stderr.read() == b""
    assert writer.wait(60) == 1

"""Light commands: neither torch nor transformers, the right exit code, little time; each in a fresh interpreter."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from mrlm_cli.recipe import compose
from tests.test_recipe_bad_input import GOOD

HEAVY = ("torch", "transformers", "safetensors", "tokenizers", "numpy")
RECIPES = sorted(compose.shipped("recipes"))
FRAGMENTS = [str(path) for path in compose.shipped("configs").values()]
RUN = """
import contextlib, io, json, sys
from mrlm_cli.cli.app import main
results = []
for arguments in json.loads(sys.argv[1]):
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        code = main(arguments)
    results.append([code, len(text.getvalue())])
print(json.dumps({"results": results, "modules": sorted({name.partition(".")[0] for name in sys.modules})}))
"""


def fresh(commands: list[list[str]], folder: Path) -> tuple[list[list[int]], set[str]]:
    """([exit code, characters written] of each command, modules) of commands run in one new interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(compose.__file__).parents[2])},
        timeout=60,
        check=True,
    )
    found = json.loads(done.stdout)
    return found["results"], set(found["modules"])


@pytest.mark.parametrize(
    "commands",
    [
        [["--help"]],
        [["--version"]],
        [["train", "--help"], ["eval", "--help"], ["resume", "--help"]],
        [["list"]],
        [["schema"]],
        [["info"], ["info", "--json"]],
        [
            ["explain", "optimizer.lr"],
            ["explain", "approx_kl"],
            ["explain", "sort_digits"],
            ["explain", "algorithm.clip"],
        ],
        [["validate", *RECIPES, *FRAGMENTS]],
        [["show", name] for name in RECIPES],
        [["show", name, "--json"] for name in RECIPES],
    ],
    ids=lambda commands: commands[0][0],
)
def test_light_commands_import_nothing_heavy(tmp_path: Path, commands: list[list[str]]) -> None:
    results, modules = fresh(commands, tmp_path)
    assert [code for code, _ in results] == [0] * len(commands)
    assert all(written > 0 for _, written in results)
    assert modules.isdisjoint(HEAVY)


def test_a_dry_run_imports_nothing_heavy_and_says_what_is_missing(tmp_path: Path) -> None:
    results, modules = fresh([["train", name, "--dry-run"] for name in RECIPES], tmp_path)
    for name, (code, _) in zip(RECIPES, results, strict=True):
        model = compose.load(name).recipe.model  # no pretrained model lies in an empty folder
        lacking = name == "verifiers_smoke" and find_spec("verifiers") is None  # the one extra that tests do not bring
        assert code == (2 if lacking or model.type != "scratch" else 0), name
    assert modules.isdisjoint(HEAVY)
    assert list(tmp_path.iterdir()) == []


def test_wrong_input_is_answered_without_anything_heavy(tmp_path: Path) -> None:
    commands = [["train", "nothing.yaml"], ["train", "quickstart", "lr=3"], ["frobnicate"], ["explain", "nothing"]]
    results, modules = fresh(commands, tmp_path)
    assert [code for code, _ in results] == [2] * 4
    assert modules.isdisjoint(HEAVY)


def test_a_heavy_import_would_be_seen(tmp_path: Path) -> None:
    """A plugin that imports numpy stands for a command that imports torch."""
    body = "class Heavy(Environment):\n    size = task = open = None\n"
    plugin = f"import numpy\nfrom mrlm_cli.envs.base import Environment\n{body}"
    (tmp_path / "heavy_env.py").write_text(plugin)
    (tmp_path / "r.yaml").write_text(GOOD.replace("sort_digits, digits: 4", "./heavy_env.py:Heavy"))
    results, modules = fresh([["validate", "r.yaml"]], tmp_path)
    assert results[0][0] == 0
    assert modules & set(HEAVY) == {"numpy"}


def test_a_target_that_is_none_is_told_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    (tmp_path / "missing.yaml").write_text(GOOD.replace("scratch, layers: 1, hidden: 32", "pretrained, path: ./none"))
    commands = [
        ["eval", "nothing"],
        ["collect", "nothing"],
        ["resume", "nothing"],
        ["resume"],
        ["train", "missing.yaml"],
    ]
    results, modules = fresh(commands, tmp_path)
    assert [code for code, _ in results] == [2] * len(commands)
    assert modules.isdisjoint({"torch", "transformers", "numpy"})

"""What a recipe names outside of itself is looked for, at its own place, without loading or running anything."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from mrlm_cli import api, registry
from mrlm_cli.cli.app import main
from mrlm_cli.envs import code as code_environment
from mrlm_cli.envs import code_files, sentiment
from mrlm_cli.errors import MissingExtra
from mrlm_cli.policy import gguf, lora
from mrlm_cli.recipe import compose, extras
from mrlm_cli.recipe.checkpoints import name
from mrlm_cli.recipe.schema import Recipe
from mrlm_cli.rewards import text as text_rewards
from tests.data_helpers import chats

HEAD = """\
name: r
steps: 2
model: {type: scratch, layers: 1, hidden: 32}
"""
PPO = "algorithm: {type: ppo}\nenvironments: [{type: sort_digits, digits: 3}]\nsampling: {max_new_tokens: 4}\n"
FUNCTIONS = """
from os.path import join as put
import sys

TABLE = {"a": 1}
if sys.platform:
    def hidden(transcript): return 0.0
raise RuntimeError("nothing here is run")

def good(transcript): return 1.0
class Likes: ...
"""


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "score.py").write_text(FUNCTIONS)
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "package" / "inner").mkdir(parents=True)
    (tmp_path / "package" / "__init__.py").write_text("raise RuntimeError('nor this')\n")
    (tmp_path / "package" / "inner" / "__init__.py").write_text("def deep(transcript): return 0.0\n")
    (tmp_path / "package" / "many.py").write_text("from os import *\n")
    (tmp_path / "rows.jsonl").write_text('{"problem": "1?", "answer": "1"}\n')


def validated(capsys: pytest.CaptureFixture[str], text: str) -> tuple[int, list[str]]:
    Path("r.yaml").write_text(text)
    code = main(["validate", "r.yaml"])
    out, err = capsys.readouterr()
    return code, (err or out).splitlines()


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("./score.py:good", ""),
        ("./score.py:hidden", ""),
        ("./score.py:Likes", ""),
        ("./score.py:put", ""),
        ("./score.py:TABLE", ""),
        ("./score.py:goood", "has no function 'goood'"),
        ("./none.py:good", "no file ./none.py (looked in"),
        ("./broken.py:f", "broken.py:1 is not Python"),
        ("package.inner:deep", ""),
        ("package.inner:shallow", "package.inner has no function 'shallow'"),
        ("package.many:join", ""),
        ("package.outer:deep", "there is no module package.outer"),
        ("nowhere_at_all:f", "there is no module nowhere_at_all"),
        ("json.decoder:JSONDecoder", ""),
        ("math:sqrt", ""),
    ],
)
def test_functions(capsys: pytest.CaptureFixture[str], path: str, told: str) -> None:
    code, lines = validated(capsys, HEAD + PPO + f"rewards: [{{type: function, path: {path!r}}}]\n")
    assert code == (2 if told else 0)
    if told:
        assert lines[0].startswith("r.yaml:7:34 rewards.0.path: ")
        assert told in lines[0]


def test_a_plain_folder_hides_no_package_and_a_package_that_hides_one_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """As Python imports: the function is found by the training too, and from the same file."""
    text = HEAD + PPO + "rewards: [{type: function, path: '%s'}]\n"
    (tmp_path / "colorsys").mkdir()  # of the standard library
    (tmp_path / "colorsys" / "data.txt").touch()
    (tmp_path / "wsgiref").mkdir()
    for path in ("colorsys:rgb_to_hls", "wsgiref.util:guess_scheme"):
        assert validated(capsys, text % path) == (0, ["r.yaml: a valid recipe"])
        made = registry.function(path)
        assert not str(sys.modules[made.__module__].__file__).startswith(str(tmp_path))
    (tmp_path / "wsgiref" / "__init__.py").touch()
    for path, told in (
        ("wsgiref.util:guess_scheme", f"there is no module wsgiref.util; wsgiref is {tmp_path / 'wsgiref'}"),
        ("wsgiref:util", f"wsgiref has no function 'util'; it is {tmp_path / 'wsgiref' / '__init__.py'}"),
    ):
        assert validated(capsys, text % path) == (2, [f"r.yaml:7:34 rewards.0.path: {told}"])
    (tmp_path / "spaces" / "inner").mkdir(parents=True)
    (tmp_path / "spaces" / "inner" / "scores.py").write_text("def good(transcript): return 1.0\n")
    assert validated(capsys, text % "spaces.inner.scores:good")[0] == 0  # without any __init__
    assert validated(capsys, text % "spaces.inner.scores:bad")[0] == 2


MATH = "environments: [{type: math, path: %s}]"
OTHERS: list[tuple[str, str, str]] = [
    (MATH % "./rows.jsonl", "", ""),
    (MATH % "./none.jsonl", "environments.0.path", "there is no file ./none.jsonl"),
    (MATH % "./package", "environments.0.path", "package is a directory; expected a file"),
    ("environments: [{type: code, path: human_eval}]", "", ""),
    (
        "environments: [{type: tools, functions: [./score.py:good, ./score.py:bad]}]",
        "environments.0.functions.1",
        "has no function 'bad'",
    ),
    (
        "environments: [{type: tools, mcp: [{command: [python, ./server.py]}]}]",
        "environments.0.mcp.0.command.1",
        "there is no file ./server.py",
    ),
    (
        "environments: [{type: tools, mcp: [{command: [npx, -y, '@scope/server-files', --in=a/b.py, 'http://a/b']}]}]",
        "",
        "",
    ),
    ("rewards: [{type: lexicon, path: words.txt}]", "rewards.0.path", "there is no file words.txt"),
    ("rewards: [{type: local_judge, path: ./none}]", "rewards.0.path", "there is no model at none"),
    ("rewards: [{type: reward_model, path: ./none}]", "rewards.0.path", "there is no reward model ./none"),
]


@pytest.mark.parametrize(("text", "key", "told"), OTHERS)
def test_what_else_is_named(capsys: pytest.CaptureFixture[str], text: str, key: str, told: str) -> None:
    rest = "algorithm: {type: ppo}\n" + ("" if text.startswith("env") else PPO.partition("\n")[2])
    code, lines = validated(capsys, f"{HEAD}{rest}{text}\n")
    assert code == (2 if told else 0), lines
    if told:
        place, found, message = lines[0].split(" ", 2)
        _, line, column, *_ = place.split(":")
        assert (found, told in message) == (f"{key}:", True), lines
        there = Path("r.yaml").read_text().splitlines()[int(line) - 1][int(column) - 1 :]
        assert there.startswith(("./", "words.txt")), there


def test_data_and_what_a_run_is_yet_to_write(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = HEAD + "algorithm: {type: sft}\ndata: {type: jsonl, path: %s}\n"
    assert validated(capsys, data % "./none.jsonl")[1] == ["r.yaml:5:27 data.path: there is no file ./none.jsonl"]
    code, lines = validated(capsys, data % "runs/later.jsonl")
    assert (code, lines) == (
        0,
        [
            "r.yaml: a valid recipe",
            "  not here yet: r.yaml:5:27 data.path: there is no file runs/later.jsonl; "
            "mrlm collect … --out runs/later.jsonl makes it",
        ],
    )
    chats(tmp_path / "rows.jsonl")
    assert validated(capsys, data % "./rows.jsonl")[0] == 0
    episodes = HEAD + "algorithm: {type: sft}\ndata: {type: episodes, path: ./package}\n"
    assert "holds no stored episodes" in validated(capsys, episodes)[1][0]
    code, lines = validated(capsys, data % "./none.jsonl" + "hardware: {threads: 0}\n")
    assert [line.split(" ")[1] for line in lines] == ["hardware.threads:"]  # what is written comes first


def test_a_reward_model_that_is_another_kind_of_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Exit 2 and one sentence at its place: for validate, a dry run and a training alike."""
    Path("small.yaml").write_text(HEAD.replace("name: r", "name: ppo") + PPO + "hardware: {threads: 1}\n")
    run = api.train(api.load_recipe("small.yaml", ["steps=1", "evaluate.tasks=2", "sampling.tasks_per_step=4"]))
    capsys.readouterr()
    text = HEAD + PPO + "rewards: [{type: reward_model, path: %s}]\n"
    told = "r.yaml:7:38 rewards.0.path: {} is a run of ppo; expected a run or checkpoint of algorithm reward_model"
    for path in (run, run / "checkpoints" / name(1)):
        code, lines = validated(capsys, text % path)
        assert (code, lines) == (2, [told.format(path.resolve())])
        for command in (["--dry-run"], []):
            assert main(["train", "r.yaml", *command]) == 2
            assert capsys.readouterr().err.splitlines() == lines
    assert not Path("runs/r").exists()
    (tmp_path / "runs" / "empty" / "checkpoints").mkdir(parents=True)
    assert "is a run without a checkpoint yet" in validated(capsys, text % "runs/empty")[1][0]
    assert (
        "is a run without a checkpoint yet"
        in validated(capsys, text.replace("reward_model", "local_judge") % "runs/empty")[1][0]
    )


PLAIN = {
    "name": "r",
    "steps": 2,
    "model": {"type": "scratch", "layers": 1, "hidden": 32},
    "algorithm": {"type": "ppo"},
    "environments": [{"type": "sort_digits"}],
    "sampling": {"max_new_tokens": 4, "max_turns": 100},
}
READS = {"environments": None, "sampling": None, "algorithm": {"type": "sft"}}
NEEDY: list[tuple[str, str, dict[str, Any]]] = [
    ("sentiment", "environments.0", {"environments": [{"type": "sentiment"}]}),
    ("sentiment", "rewards.0", {"rewards": [{"type": "lexicon"}]}),
    ("code", "environments.0", {"environments": [{"type": "code", "path": "human_eval"}]}),
    ("search", "environments.0", {"environments": [{"type": "tools", "tools": ["search"]}]}),
    ("math", "environments.0", {"environments": [{"type": "math", "checker": "math_verify"}]}),
    ("reasoning", "environments.0", {"environments": [{"type": "reasoning", "tasks": {"chain_sum": 1}}]}),
    ("textarena", "environments.0", {"environments": [{"type": "textarena", "game": "GuessTheNumber-v0"}]}),
    (
        "gymnasium",
        "environments.0",
        {"environments": [{"type": "gymnasium", "id": "CartPole-v1", "success_reward": 9.0}]},
    ),
    ("verifiers", "environments.0", {"environments": [{"type": "verifiers", "path": "./score.py:good"}]}),
    ("mcp", "environments.0.mcp.0", {"environments": [{"type": "tools", "mcp": [{"command": ["python"]}]}]}),
    ("judge", "rewards.0", {"rewards": [{"type": "judge", "url": "http://x/v1", "model": "m", "instruction": "Say"}]}),
    ("parquet", "environments.0.path", {"environments": [{"type": "math", "path": "rows.parquet"}]}),
    ("parquet", "data", {**READS, "data": {"type": "parquet", "path": "rows.parquet"}}),
    ("hub", "data", {**READS, "data": {"type": "hub", "path": "someone/rows"}}),
    ("gguf", "model.path", {"model": {"type": "pretrained", "path": "./m.gguf"}}),
    ("lora", "model.lora", {"model": {**PLAIN["model"], "lora": {"rank": 2}}}),
    ("lora", "model.path", {"model": {"type": "pretrained", "path": "./adapters"}}),
]


@pytest.mark.parametrize(("extra", "key", "sections"), NEEDY)
def test_an_extra_that_is_needed_and_not_installed_is_told_by_the_setting_that_needs_it(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    extra: str,
    key: str,
    sections: dict[str, Any],
) -> None:
    for file in ("rows.parquet", "m.gguf"):
        Path(file).touch()
    Path("adapters").mkdir()
    Path("adapters/adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}')
    whole = {name: value for name, value in {**PLAIN, **sections}.items() if value is not None}
    text = yaml.safe_dump(whole, sort_keys=False)
    for module in [*extras.MODULES[extra], *sys.modules]:
        if module.partition(".")[0] in extras.MODULES[extra]:
            monkeypatch.setitem(sys.modules, module, None)
    for kept in (sentiment._scorer, text_rewards._vader, code_environment._split, code_files.read):
        kept.cache_clear()
    code, lines = validated(capsys, text)
    assert (code, lines[0]) == (0, "r.yaml: a valid recipe")
    told = lines[1].removeprefix("  not here yet: ")
    assert re.fullmatch(rf"r\.yaml:\d+:\d+ {key}: needs an optional package: pip install 'mrlm\[{extra}\]'", told)
    assert lines[2:] == []
    for more in (["--dry-run"], []):
        assert main(["train", "r.yaml", *more]) == 2
        assert capsys.readouterr().err == f"{told}\n"
    with pytest.raises(MissingExtra, match=rf"mrlm\[{extra}\]"):  # so does what is made without being checked before
        make(compose.load("r.yaml").recipe, key)
    capsys.readouterr()  # a sandbox says which one it is
    for module in extras.MODULES[extra]:
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    assert validated(capsys, text) == (0, ["r.yaml: a valid recipe"])


def make(recipe: Recipe, key: str) -> None:
    """Make what the setting belongs to, as a run does."""
    section, model = key.partition(".")[0], recipe.model
    if section == "model" and model.type == "pretrained" and model.path.endswith(".gguf"):
        gguf.require()
    elif section == "model":
        lora._peft()
    elif section == "data":
        assert recipe.data is not None
        next(registry.resolve("data", recipe.data.type)(recipe.data).rows("train"))
    else:
        (settings,) = getattr(recipe, section)
        registry.resolve(section, settings.type)(settings).size("train")

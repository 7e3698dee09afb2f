"""Includes, overlays, overrides, paths, origins, and the way back to YAML."""

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrlm_cli.errors import RecipeError, UnknownName, UserError
from mrlm_cli.recipe import compose
from mrlm_cli.recipe.reading import read
from mrlm_cli.recipe.sections import PretrainedModel
from tests.test_recipe_bad_input import GOOD

PLUGIN = '''
from mrlm_cli.envs.base import Environment
from mrlm_cli.strict import EnvironmentSettings

class Echo(Environment):
    """Say it again."""

    components = {"exact": 1.0}
    size = task = open = None  # a recipe is composed without them

    class Config(EnvironmentSettings):
        """Settings."""

        words_path: str = "words.txt"
        """Where the words are."""
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(GOOD)
    return tmp_path


def message(*arguments: object, **keywords: object) -> str:
    with pytest.raises(UserError) as caught:
        compose.load(*arguments, **keywords)
    return str(caught.value)


def test_layers_come_in_order(folder: Path) -> None:
    (folder / "one.yaml").write_text("sampling: {tasks_per_step: 1, max_new_tokens: 11, max_turns: 1}\nseed: 1\n")
    (folder / "two.yaml").write_text("sampling: {max_new_tokens: 12, max_turns: 2}\nseed: 2\n")
    (folder / "over.yaml").write_text("sampling: {temperature: 0.5}\nalgorithm: {gamma: 0.5}\n")
    (folder / "small.yaml").write_text(f"include: [one, two]\n{GOOD}")
    loaded = compose.load("small.yaml", ["algorithm.gamma=0.25", "algorithm.gamma=0.75"], "over.yaml")
    sampling = loaded.recipe.sampling
    assert (sampling.tasks_per_step, sampling.max_new_tokens, sampling.max_turns) == (8, 12, 2)  # body, second, second
    assert (sampling.temperature, loaded.recipe.seed, sampling.episodes_per_task) == (
        0.5,
        2,
        1,
    )  # overlay, second, default
    assert loaded.recipe.algorithm.gamma == 0.75  # the last override
    wanted = {
        "sampling.tasks_per_step": "small.yaml:8",
        "sampling.max_new_tokens": "two.yaml:1",
        "sampling.temperature": "over.yaml:1",
        "sampling.episodes_per_task": "default",
        "algorithm.gamma": "override",
        "algorithm.clip": "small.yaml:11",
        "environments.0.digits": "small.yaml:6",
        "seed": "two.yaml:2",
    }
    assert {key: loaded.origins[key] for key in wanted} == wanted
    assert loaded.origins.keys() == compose.values(loaded.recipe).keys()


def test_lists_are_replaced_whole(folder: Path) -> None:
    (folder / "over.yaml").write_text("environments: [{type: sort_digits, name: other}]\n")
    (environment,) = compose.load("small.yaml", overlay="over.yaml").recipe.environments
    assert (environment.label, environment.digits) == ("other", 6)  # digits: the default again


def test_includes_are_searched_beside_then_in_configs_then_among_the_shipped(folder: Path) -> None:
    (folder / "sub").mkdir()
    recipe = folder / "sub" / "small.yaml"
    recipe.write_text(f"include: hardware/cpu\n{GOOD}")

    def threads() -> int | None:
        return compose.load(recipe).recipe.hardware.threads

    assert compose.load(recipe).recipe.hardware.device == "cpu"  # the shipped one
    (folder / "configs" / "hardware").mkdir(parents=True)
    (folder / "configs" / "hardware" / "cpu.yaml").write_text("hardware: {threads: 2}")
    assert threads() == 2
    (folder / "sub" / "hardware").mkdir()
    (folder / "sub" / "hardware" / "cpu.yaml").write_text("hardware: {threads: 3}")
    assert threads() == 3


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("include: [x]\n", "part.yaml:1:1 include: a fragment includes nothing"),
        (GOOD, "small.yaml:1:11 include: part.yaml is a whole recipe"),
        ("hardware: {device: gpu}\n", 'part.yaml:1:20 hardware.device: got "gpu"; expected one of auto, cpu, cuda'),
    ],
)
def test_a_wrong_include(folder: Path, text: str, told: str) -> None:
    (folder / "part.yaml").write_text(text)
    (folder / "small.yaml").write_text(f"include: [part]\n{GOOD}")
    assert message("small.yaml").startswith(told)


def test_a_fragment_is_valid_and_cannot_be_trained(folder: Path) -> None:
    (folder / "part.yaml").write_text("hardware: {threads: 2}\noptimizer: {lr: 1}\n")
    checked = compose.check("part.yaml", ["hardware.threads=3"])
    assert checked.fragment
    assert checked.sections["hardware"].threads == 3
    assert "include: [" in message("part.yaml")
    (folder / "part.yaml").write_text("hardware: {threads: 0}\nsteps: no\n")
    with pytest.raises(
        RecipeError, match=r"part.yaml:1:21 hardware.threads: got 0(.|\n)*part.yaml:2:8 steps: got \"no\""
    ):
        compose.check("part.yaml")


def test_a_recipe_without_environments_is_no_fragment(folder: Path) -> None:
    (folder / "part.yaml").write_text("algorithm: {type: ppo}\n")
    assert "part.yaml:1:1 environments: required, and missing" in message("part.yaml")


def test_overrides_reach_everything(folder: Path) -> None:
    recipe = compose.load(
        "small.yaml",
        ["environments.0.digits=2", "algorithm.kl={coef: 0.5, form: k2}", "sampling.stop=[a, '=']", "model.mlp=null",
         "algorithm.clip.1=0.3", "name=x=y".replace("=y", ""), "model.value.head=mlp"],
    ).recipe  # fmt: skip
    assert recipe.environments[0].digits == 2
    assert (recipe.algorithm.kl.coef, recipe.algorithm.kl.form, recipe.algorithm.clip) == (0.5, "k2", (0.2, 0.3))
    assert (recipe.sampling.stop, recipe.model.mlp, recipe.name) == (("a", "="), None, "x")
    assert recipe.model.value.head == "mlp"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("lr=3", "override lr=3: unknown key; did you mean optimizer.lr?"),
        ("digits=3", "override digits=3: unknown key; did you mean environments.0.digits?"),
        ("optimizer.lr=3", "override optimizer.lr=3: got 3; expected a number of at most 1"),
        ("optimizer={lr: x}", 'override optimizer={lr: x}: optimizer.lr: got "x"; expected a number'),
        ("optimizer.lrr=3", "override optimizer.lrr=3: unknown key; did you mean lr?"),
        ("optimizer.lr.x=3", "override optimizer.lr.x=3: there is nothing below this key"),
        ("environments.1.digits=2", "override environments.1.digits=2: expected an index from 0 to 0 instead of '1'"),
        ("environments.digits=2", "override environments.digits=2: expected an index from 0 to 0 instead of 'digits'"),
        ("optimizer", "override optimizer: expected key.path=value"),
        (
            "over.yaml",
            "override over.yaml: expected key.path=value, such as optimizer.lr=1e-4; a second file is given as",
        ),
        ("=3", "override =3: expected key.path=value; a part of the key is empty"),
        ("a..b=3", "override a..b=3: expected key.path=value; a part of the key is empty"),
        ("optimizer.lr=[1", "override optimizer.lr=[1: not valid YAML"),
        ("optimizer.lr=!!int 1", "override optimizer.lr=!!int 1: tag tag:yaml.org,2002:int is not allowed"),
        ("optimizer={lr: 1, lr: 2}", "override optimizer={lr: 1, lr: 2}: lr: the key appears twice"),
        ("include=x", "override include=x: include cannot be overridden"),
        ("sampling=", "override sampling=: got null; expected a mapping"),
    ],
)
def test_a_wrong_override_is_named(folder: Path, override: str, told: str) -> None:
    assert message("small.yaml", [override]).startswith(told)


def test_all_wrong_overrides_are_told_at_once(folder: Path) -> None:
    assert len(message("small.yaml", ["lr=3", "optimizer.lr=x", "seed=no"]).splitlines()) == 3
    assert len(message("small.yaml", ["lr", "=x", "seed"]).splitlines()) == 3


def test_paths_are_found_beside_the_recipe_then_here_and_stored_absolute(folder: Path) -> None:
    sub = folder / "sub"
    (sub / "models" / "a").mkdir(parents=True)
    (folder / "models" / "a").mkdir(parents=True)
    (folder / "models" / "b").mkdir()
    (sub / "r.yaml").write_text(
        GOOD.replace("{type: scratch, layers: 1, hidden: 32}", "{type: pretrained, path: models/a}")
    )

    def path(*overrides: str) -> str:
        model = compose.load("sub/r.yaml", overrides).recipe.model
        assert isinstance(model, PretrainedModel)
        return model.path

    assert path() == str(sub / "models" / "a")
    assert path("model.path=models/b") == str(folder / "models" / "b")
    assert path("model.path=models/c") == "models/c"  # not fetched yet
    assert path("model.path=some/hub-id") == "some/hub-id"
    critic = compose.load("sub/r.yaml", ["model.value={type: separate, path: ./models/b}"]).recipe.model.value
    assert critic.path == str(folder / "models" / "b")


def test_a_plugin_beside_the_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sub = folder / "sub"
    sub.mkdir()
    (sub / "echo_env.py").write_text(PLUGIN)
    (sub / "words.txt").write_text("a")
    (sub / "r.yaml").write_text(GOOD.replace("sort_digits, digits: 4", "./echo_env.py:Echo, words_path: ./words.txt"))
    loaded = compose.load("sub/r.yaml")
    (environment,) = loaded.recipe.environments
    assert (environment.label, environment.type) == ("Echo", f"{sub / 'echo_env.py'}:Echo")
    assert environment.words_path == str(sub / "words.txt")
    monkeypatch.chdir(sub.parent.parent)
    (folder / "stored.yaml").write_text(compose.dump(loaded.recipe))
    assert compose.load(folder / "stored.yaml").recipe == loaded.recipe  # from anywhere
    told = message(folder / "stored.yaml", ["environments.0.word_path=x"])
    assert told.endswith("unknown key for type " + environment.type + "; did you mean words_path?")


def test_a_module_beside_the_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "echo_module.py").write_text(PLUGIN)
    (folder / "r.yaml").write_text(GOOD.replace("sort_digits, digits: 4", "'echo_module:Echo'"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "echo_module", raising=False)
    assert compose.load("r.yaml").recipe.environments[0].label == "Echo"


def test_a_plugin_that_cannot_be_imported_is_told_at_its_line(folder: Path) -> None:
    (folder / "broken_env.py").write_text("import nothing_like_this\n")
    (folder / "r.yaml").write_text(GOOD.replace("sort_digits, digits: 4", "./broken_env.py:Echo"))
    assert "r.yaml:5:12 environments.0.type: " in message("r.yaml")
    assert "No module named 'nothing_like_this'" in message("r.yaml")


@pytest.mark.parametrize("name", sorted(compose.shipped("recipes")))
def test_dump_loads_back_equal(tmp_path: Path, name: str) -> None:
    recipe = compose.load(name).recipe
    (tmp_path / "again.yaml").write_text(compose.dump(recipe))
    again = compose.load(tmp_path / "again.yaml")
    assert again.recipe == recipe
    assert set(again.origins.values()).isdisjoint({"default", "override"})  # every value is explicit


TRAPS = ["1e-5", "no", "~", "0x1", "null", ".nan", "<<", "a: b", "- x", "12:30", "1_0", ""]


@settings(max_examples=100, deadline=None)
@given(
    system=st.one_of(st.none(), st.text(st.characters(exclude_categories=("Cs",))), st.sampled_from(TRAPS)),
    lr=st.floats(min_value=1e-300, max_value=1.0),
)
def test_any_text_and_number_survive_the_way_through_yaml(system: str | None, lr: float) -> None:
    recipe = compose.load("quickstart").recipe
    chat = recipe.model.chat.model_copy(update={"system": system})
    changed = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"chat": chat}),
            "optimizer": recipe.optimizer.model_copy(update={"lr": lr}),
        }
    )
    assert read(compose.dump(changed), "dump").plain == changed.model_dump(mode="json")


@pytest.mark.parametrize(
    "environment", ["{type: arithmetic, digits: 2}", "{type: arithmetic, low: 3}", "{type: guess}"]
)
def test_the_dump_of_every_kind_of_setting_loads_back(tmp_path: Path, environment: str) -> None:
    (tmp_path / "one.yaml").write_text(
        f"name: one\nsteps: 1\nmodel: {{type: scratch}}\nenvironments: [{environment}]\nalgorithm: {{type: ppo}}\n"
    )
    recipe = compose.load(tmp_path / "one.yaml").recipe
    (tmp_path / "two.yaml").write_text(compose.dump(recipe))
    assert compose.load(tmp_path / "two.yaml").recipe == recipe


def test_recipes_are_found_by_path_and_by_name(folder: Path) -> None:
    assert compose.find("quickstart") == compose.shipped("recipes")["quickstart"]
    assert compose.find("small.yaml") == folder / "small.yaml"
    with pytest.raises(UnknownName, match=r"no recipe quikstart; did you mean quickstart\?"):
        compose.find("quikstart")
    with pytest.raises(UnknownName, match=r"did you mean small.yaml\?"):
        compose.find("smal.yaml")
    (folder / "runs").mkdir()
    with pytest.raises(UnknownName, match=r"runs is a directory; expected a recipe's file$"):
        compose.find("runs")
    (folder / "runs/one").mkdir()
    (folder / "runs/one/recipe.yaml").write_text("")
    with pytest.raises(UnknownName, match="mrlm resume runs/one"):
        compose.find("runs/one")
    for name in ("a\0b", "x" * 5000):
        with pytest.raises(UnknownName, match=r"cannot be a file|no recipe"):
            compose.find(name)


def test_an_unreadable_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object, **keywords: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)  # root, who may run this test, reads everything
    assert message("small.yaml") == "small.yaml cannot be read: Permission denied"

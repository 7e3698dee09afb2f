"""Documents agree with the code: everything that can be named appears in a table, every YAML validates."""

import re
import tomllib
from pathlib import Path

import pytest

from mrlm_cli import registry
from mrlm_cli.cli.app import app
from mrlm_cli.metrics import METRICS
from mrlm_cli.recipe import compose, extras

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(command.name or "" for command in app.registered_commands)
ENTRIES = sorted({name for kind in registry.BUILT_IN for name in registry.BUILT_IN[kind]})
EXTRAS = sorted(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
YAMLS = sorted([*(ROOT / "recipes").rglob("*.yaml"), *(ROOT / "configs").rglob("*.yaml")])


@pytest.fixture(scope="module")
def pages() -> str:
    return "\n".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "recipes/README.md"))


def rows(pages: str) -> list[str]:
    return [line for line in pages.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("name", [*ENTRIES, *METRICS, *EXTRAS, *sorted(compose.shipped("recipes"))])
def test_every_name_has_its_row(pages: str, name: str) -> None:
    assert any(re.search(rf"`[^`]*(?<![\w/]){re.escape(name)}(?![\w/])[^`]*`", row) for row in rows(pages))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_row(pages: str, name: str) -> None:
    assert any(re.search(rf"`mrlm {name}\b", row) for row in rows(pages))


def test_no_command_is_made_up(pages: str) -> None:
    named = re.findall(r"(?:`|^)(?:\$ )?mrlm ([a-z]+)\b", pages, re.MULTILINE)
    assert named
    assert set(named) <= set(COMMANDS)


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_yaml_validates_and_has_a_headline(path: Path) -> None:
    checked = compose.check(path)
    assert checked.fragment == (path.parts[len(ROOT.parts)] == "configs")
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 20


@pytest.mark.parametrize("name", sorted(compose.shipped("recipes")))
def test_a_recipe_is_called_as_its_file(name: str) -> None:
    assert compose.load(name).recipe.name == name


def test_the_readme_shows_the_quickstart_as_it_is() -> None:
    text = (ROOT / "recipes/quickstart.yaml").read_text(encoding="utf-8")
    body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    assert f"```yaml\n{body}\n```" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_extras_that_commands_look_for_exist() -> None:
    assert set(extras.MODULES) == set(EXTRAS) - {"test"}

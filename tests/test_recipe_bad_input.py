"""Every kind of broken recipe gets its place and a helpful line; no text whatever gives anything but that."""

# ruff: noqa: E501 - a row of the table is one line

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mrlm_cli.errors import RecipeError, UnknownName
from mrlm_cli.recipe import compose, explain
from mrlm_cli.recipe.problems import SYNONYMS
from mrlm_cli.recipe.reading import read
from mrlm_cli.recipe.schema import Recipe

GOOD = """\
name: small
steps: 10
model: {type: scratch, layers: 1, hidden: 32}
environments:
  - {type: sort_digits, digits: 4}
sampling:
  tasks_per_step: 8
algorithm:
  type: ppo
  clip: [0.2, 0.2]
optimizer:
  lr: 1e-3
  minibatches: 2
"""


def changed(old: str, new: str) -> str:
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new)


BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{', '.join(f'*{before}' for _ in range(10))}]\n"
    for before, name in zip("abcdef", "bcdefg", strict=True)
)

# (what, text, where it must be said, what must be said)
TABLE = [
    ("empty", "", "1:1", "the file is empty"),
    ("only a comment", "# nothing\n", "1:1", "the file is empty"),
    ("a list", "- 1\n", "1:1", "expected a mapping"),
    ("a scalar", "hello\n", "1:1", "expected a mapping"),
    ("two documents", GOOD + "---\nname: b\n", "14:1", "a second document"),
    ("tab indent", changed("  tasks_per_step", "\ttasks_per_step"), "7:1", "a tab"),
    ("tag", changed("1e-3", "!!float 1e-3"), "12:7 optimizer.lr", "tag tag:yaml.org,2002:float is not allowed"),
    ("python tag", changed("1e-3", "!!python/object/apply:os.system [x]"), "12:7 optimizer.lr", "is not allowed"),
    ("local tag on a mapping", changed("{type: scratch", "!x {type: scratch"), "3:8 model", "tag !x is not allowed"),
    ("duplicate top key", GOOD + "name: again\n", "14:1 name", "twice; first at line 1"),
    ("duplicate inner key", changed("hidden: 32", "hidden: 32, hidden: 64"), "3:47 model.hidden", "twice"),
    ("alias bomb", BOMB, "4:4 d", "more than 10,000 values"),
    ("alias cycle", "a: &a [1, *a]\n", "1:11 a.1", "stands inside its own anchor"),
    ("alias cycle in a map", "a: &a {b: *a}\n", "1:11 a.b", "stands inside its own anchor"),
    ("alias of nothing", "a: *b\n", "1:4 a", "has no anchor"),
    ("merge key", "a: &a {x: 1}\nb:\n  <<: *a\n" + GOOD, "1:1 a", "unknown key"),
    ("nesting bomb", "a: " + "[" * 500 + "]" * 500, "1:35", "nested deeper than 32"),
    ("unclosed nesting bomb", "[" * 100_000, "1:33", "nested deeper than 32"),
    ("map nesting bomb", "{a: " * 60 + "1" + "}" * 60, "1:129", "nested deeper than 32"),
    ("nested by aliases", "a: &a " + "[" * 20 + "]" * 20 + "\nb: " + "[" * 15 + "*a" + "]" * 15, "2:19", "nested deeper"),
    ("unclosed bracket", changed("[0.2, 0.2]", "[0.2, 0.2"), "11:10", "not valid YAML"),
    ("unclosed quote", changed("name: small", 'name: "small'), "14:1", "not valid YAML"),
    ("bad escape", changed("name: small", 'name: "\\UFFFFFFFF"'), "1:10", "an escape or a version"),
    ("lone surrogate", changed("name: small", 'name: "\\uD800"'), "1:7 name", "surrogate"),
    ("control character", changed("small", "sm\x07all"), "1:9", "0x7 is not allowed"),
    ("complex key", "? [a]\n: 1\n", "1:3", "a key must be plain text"),
    ("null key", "?\n: 1\n", "1:2", "a key must be plain text"),
    ("unknown top key", changed("sampling:", "sampler:"), "6:1 sampler", "unknown key; did you mean sampling?"),
    ("unknown key", changed("clip:", "clp:"), "10:3 algorithm.clp", "did you mean clip?"),
    ("key of another section", changed("  lr: 1e-3", "  clip: 1"), "12:3 optimizer.clip", "did you mean algorithm.clip?"),
    ("leaf at the top", GOOD + "lr: 3\n", "14:1 lr", "unknown key; did you mean optimizer.lr?"),
    ("usual other name", changed("  lr: 1e-3", "  learning_rate: 1e-3"), "12:3 optimizer.learning_rate", "did you mean lr?"),
    ("usual name of another section", changed("clip:", "entropy_coef: 0.1\n  clip:"), "10:3 algorithm.entropy_coef", "did you mean algorithm.entropy.coef?"),
    ("usual name at the top", GOOD + "batch_size: 3\n", "14:1 batch_size", "did you mean sampling.tasks_per_step?"),
    ("unknown env key", changed("digits: 4", "digit: 4"), "5:25 environments.0.digit", "did you mean digits?"),
    ("unknown model key", changed("hidden: 32", "hiden: 32"), "3:35 model.hiden", "for type scratch; did you mean hidden?"),
    ("key of another type", GOOD + "engine: {type: generate, cuda_graphs: true}\n", "14:26 engine.cuda_graphs", "unknown key for type generate; allowed here: type"),
    ("unknown nested key", changed("  clip:", "  kl: {coeff: 1}\n  clip:"), "10:8 algorithm.kl.coeff", "did you mean coef?"),
    ("missing name", changed("name: small\n", ""), "1:1 name", "required, and missing"),
    ("missing steps", changed("steps: 10\n", ""), "1:1 steps", "required, and missing"),
    ("missing model", changed("model: {type: scratch, layers: 1, hidden: 32}\n", ""), "1:1 model", "required"),
    ("missing algorithm type", changed("  type: ppo\n", ""), "8:1 algorithm.type", "required, and missing"),
    ("missing path", changed("{type: scratch, layers: 1, hidden: 32}", "{type: pretrained}"), "3:1 model.path", "required"),
    ("boolean for integer", changed("steps: 10", "steps: true"), "2:8 steps", "got true; expected an integer"),
    ("boolean for number", changed("1e-3", "false"), "12:7 optimizer.lr", "got false; expected a number"),
    ("text for integer", changed("steps: 10", "steps: ten"), "2:8 steps", 'got "ten"; expected an integer'),
    ("quoted number", changed("steps: 10", 'steps: "10"'), "2:8 steps", 'got "10"; expected an integer'),
    ("number for integer", changed("steps: 10", "steps: 1.5"), "2:8 steps", "expected an integer"),
    ("number for text", changed("name: small", "name: 12"), "1:7 name", "got 12; expected text"),
    ("null for integer", changed("steps: 10", "steps:"), "2:7 steps", "got null; expected an integer"),
    ("sexagesimal", changed("steps: 10", "steps: 12:30"), "2:8 steps", 'got "12:30"; expected an integer'),
    ("not a number", changed("1e-3", ".nan"), "12:7 optimizer.lr", "got .nan; expected a finite number"),
    ("infinity", changed("1e-3", "-.inf"), "12:7 optimizer.lr", "expected a finite number"),
    ("overflow", changed("1e-3", "1e999"), "12:7 optimizer.lr", "expected a finite number"),
    ("below range", changed("steps: 10", "steps: 0"), "2:8 steps", "got 0; expected a number of at least 1"),
    ("refills of nothing", changed("tasks_per_step: 8", "refills: 2"), "7:12 sampling.refills", "leaves no task out"),
    ("gradient of no trunk", changed("hidden: 32", "hidden: 32, value: {type: separate, trunk_gradient: 0.5}"), "3:54 model.value", "trunk_gradient is for type shared only"),
    ("above range", changed("1e-3", "7"), "12:7 optimizer.lr", "got 7; expected a number of at most 1"),
    ("not above", changed("1e-3", "0"), "12:7 optimizer.lr", "got 0; expected a number above 0"),
    ("negative seed", GOOD + "seed: -1\n", "14:7 seed", "of at least 0"),
    ("huge seed", GOOD + "seed: 9223372036854775808\n", "14:7 seed", "a number below"),
    ("long integer", changed("steps: 10", f"steps: {'9' * 5000}"), "2:8 steps", "expected"),
    ("YAML 1.1 yes", GOOD + "hardware: {gradient_checkpointing: yes}\n", "14:36 hardware.gradient_checkpointing", "true or false"),
    ("list too short", changed("[0.2, 0.2]", "[0.2]"), "10:3 algorithm.clip.1", "an item is missing"),
    ("list too long", changed("[0.2, 0.2]", "[0.2, 0.2, 0.2]"), "10:9 algorithm.clip", "at most 2 items, not 3"),
    ("item of a list", changed("[0.2, 0.2]", "[0.2, x]"), "10:15 algorithm.clip.1", 'got "x"; expected a number'),
    ("scalar for list", changed("[0.2, 0.2]", "0.2"), "10:9 algorithm.clip", "got 0.2; expected a list of 2: number above 0, at most 1; number above 0, at most 100, such as [0.2, 0.2]"),
    ("scalar for a list or null", changed("type: ppo", "type: grpo").replace("[0.2, 0.2]", "0.2"), "10:9 algorithm.clip", "at most 100, or null, such as [0.2, 0.2]"),
    ("scalar for a list inside a list", changed("digits: 4}", "digits: 4}\n  - {type: tools, mcp: [{command: python}]}"), "6:35 environments.1.mcp.0.command", 'got "python"; expected a list of text'),
    ("scalar for section", changed("sampling:\n  tasks_per_step: 8", "sampling: 8"), "6:11 sampling", "expected a mapping"),
    ("null section", changed("sampling:\n  tasks_per_step: 8", "sampling:"), "6:10 sampling", "got null; expected a mapping"),
    ("map for list", changed("  - {type: sort_digits, digits: 4}", "  type: sort_digits"), "5:3 environments", "expected a list"),
    ("no environment", changed("environments:\n  - {type: sort_digits, digits: 4}", "environments: []"), "4:15 environments", "at least one"),
    ("choice", changed("lr: 1e-3", "schedule: liner"), "12:13 optimizer.schedule", "did you mean linear?"),
    ("unknown algorithm", changed("type: ppo", "type: pop"), "9:9 algorithm.type", "did you mean ppo?"),
    ("unknown environment", changed("sort_digits", "sort_digit"), "5:12 environments.0.type", "did you mean sort_digits?"),
    ("unknown model", changed("scratch", "scrach"), "3:15 model.type", "did you mean scratch?"),
    ("no such plugin", changed("sort_digits", "./nowhere.py:Env"), "5:12 environments.0.type", "no file ./nowhere.py"),
    ("a class that is none", changed("sort_digits", "pathlib:Path"), "5:12 environments.0.type", "has no Config"),
    ("a module that is none", changed("sort_digits", "'./:Env'"), "5:12 environments.0.type", "cannot be imported"),
    ("a path of an unknown user", changed("sort_digits", "'~nobody-of-this-name/x.py:Env'"), "5:12 environments.0.type", "no file ~nobody"),
    ("type is no name", changed("type: ppo", "type: [ppo]"), "9:9 algorithm.type", "expected a name"),
    ("undeclared reward", changed("digits: 4", "rewards: {exct: 1}"), "5:35 environments.0.rewards.exct", "did you mean exact?"),
    ("a value function for none", changed("hidden: 32", "hidden: 32, value: {head: mlp}").replace("type: ppo", "type: reinforce++"), "3:54 model.value", "reinforce++ has no value function"),
    ("same label twice", changed("digits: 4}", "digits: 4}\n  - {type: sort_digits}"), "6:5 environments.1", "give it a `name`"),
    ("name leaves its folder", changed("name: small", "name: ../x"), "1:7 name", "expected the name of a directory"),
    ("name is a parent", changed("name: small", "name: .."), "1:7 name", "expected the name of a directory"),
    ("name with a newline", changed("name: small", 'name: "small\\n"'), "1:7 name", "expected the name of a directory"),
    ("more than the context", changed("tasks_per_step: 8", "max_tokens: 257"), "7:15 sampling.max_tokens", "context = 256"),
    ("reply fills the context", changed("tasks_per_step: 8", "max_new_tokens: 256"), "7:19 sampling.max_new_tokens", "holds the prompt"),
    ("too many minibatches", changed("minibatches: 2", "minibatches: 9"), "13:16 optimizer.minibatches", "8 episodes"),
    ("a program may outlast its session", changed("sort_digits, digits: 4", "code, sandbox: {wall_seconds: 30}"), "5:42 environments.0.sandbox.wall_seconds", "less than hardware.deadline = 30"),
    ("class's own rule", changed("hidden: 32", "hidden: 30"), "3:8 model", "multiple of 2 x heads"),
    ("include of nothing", "include: [hardware/cpuu]\n" + GOOD, "1:11 include", "did you mean hardware/cpu?"),
    ("include of a number", "include: 3\n" + GOOD, "1:10 include", "expected the name of a fragment"),
]  # fmt: skip


def refused(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with pytest.raises(RecipeError) as caught:
        compose.load(path)
    return str(caught.value)


def test_the_recipe_under_the_table_is_good(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(GOOD)
    assert compose.load(tmp_path / "recipe.yaml").recipe.optimizer.lr == 1e-3


@pytest.mark.parametrize(("text", "place", "words"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, place: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    lines = refused(tmp_path, text).splitlines()
    assert any(line.startswith(f"recipe.yaml:{place}: ") and words in line for line in lines), lines


@pytest.mark.parametrize(
    ("data", "line"),
    [(b"name: a\nsteps: \xff\n", "2:8"), (b"\xff\xfen\x00a\x00", "1:1"), ("ä: ".encode() + b"\xe4", "1:4")],
)
def test_bytes_that_are_not_utf8(tmp_path: Path, data: bytes, line: str) -> None:
    assert f"recipe.yaml:{line}: byte 0x" in refused(tmp_path, data)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    text = changed("steps: 10", "steps: 0").replace("clip:", "clp:").replace("1e-3", "yes").replace("digits: 4", "x: 1")
    told = refused(tmp_path, text).splitlines()
    assert [line.split(":")[1] for line in told] == ["5", "10", "12", "2"]


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert compose.load(tmp_path / "recipe.yaml").recipe.name == "small"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5), ("1E+3", 1000.0), (".5", 0.5), ("-1.", -1.0), ("010", 10), ("0x1f", 31), ("0o17", 15),
        ("+3", 3), ("true", True), ("False", False), ("no", "no"), ("on", "on"), ("off", "off"), ("Yes", "Yes"),
        ("12:30", "12:30"), ("1_000", "1_000"), ("2020-01-01", "2020-01-01"), ("~", None), ("", None), ("e5", "e5"),
        ('"1"', "1"), ("'null'", "null"), ("inf", "inf"), ("[1, a]", [1, "a"]), ("{a: {b: 1}}", {"a": {"b": 1}}),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    found = read(text or " ", "lr=" + text, override=True).plain
    assert found == value
    assert type(found) is type(value)


def test_a_harmless_alias_is_what_it_stands_for() -> None:
    node = read("a: &x {b: [1, 2]}\nc: *x\n", "f.yaml")
    assert node.plain == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}}


_WORDS = st.sampled_from(
    [*"{}[]:,-&*!?|>%@`'\"#\n\t ", "name", "steps", "model", "type", "ppo", "1e-3", "---", "...", "<<", "\\x", "~", "é"]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.one_of(st.text(), st.lists(_WORDS, max_size=40).map("".join)))
@example("%YAML " + "9" * 5000 + ".0\n---\na: 1")
@example('a: "\\UFFFFFFFF"')
@example("!<tag:x> a: b")
@example("a: !!binary x")
@example("&a : *a")
@example("|\n\x85")
def test_any_text_is_a_recipe_or_a_recipe_error(tmp_path: Path, text: str) -> None:
    for whole in (text, GOOD + text, GOOD.replace("small", text), GOOD.replace("1e-3", text)):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(whole.encode("utf-8", "surrogatepass"))
        with suppress(RecipeError):
            assert isinstance(compose.load(path).recipe, Recipe)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(override=st.one_of(st.text(), st.text().map("name=".__add__), st.text().map("optimizer.lr=".__add__)))
def test_any_override_is_taken_or_a_recipe_error(tmp_path: Path, override: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    with suppress(RecipeError):
        assert isinstance(compose.load(path, [override]).recipe, Recipe)


def test_every_synonym_leads_to_a_setting_and_is_none() -> None:
    known = explain.paths()
    assert set(SYNONYMS.values()) <= {path.replace(".0.", ".") for path in known}
    assert {path.rpartition(".")[2] for path in known} & set(SYNONYMS) <= {"beta"}  # dpo's own


def test_a_directory_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match=r"is a directory; expected a recipe's file$"):
        compose.load(tmp_path)
    (tmp_path / "recipe.yaml").write_text(GOOD)
    with pytest.raises(UnknownName, match=r"a recipe's file, such as .*recipe.yaml; .*: mrlm resume "):
        compose.load(tmp_path)

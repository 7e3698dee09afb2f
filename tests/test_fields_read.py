"""No dead settings: over some tiny runs, every field of every settings class is read by the code of the package.

Attribute reads are recorded with the function that made them. Reads by validators and by the recipe package do not
count: checking or printing a value is not obeying it.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel

from mrlm_cli import api, registry
from mrlm_cli.algorithms.group_settings import GroupKL, GroupSettings
from mrlm_cli.envs.host import NoJournal
from mrlm_cli.recipe import compose, sections
from mrlm_cli.recipe.schema import Recipe
from mrlm_cli.records import Message, Reply, Task, Transcript
from mrlm_cli.rewards.firewall import Scorers
from mrlm_cli.rewards.wire import checked
from mrlm_cli.strict import AlgorithmSettings, DataSettings, EngineSettings, EnvironmentSettings, RewardSettings, Strict
from tests.data_helpers import jsonl, pair_row, two_turns
from tests.kit import tiny, trainer

RECIPES = Path(__file__).parents[1] / "recipes"
ABSENT = [name for name in ("textarena", "gymnasium", "verifiers") if importlib.util.find_spec(name) is None]
ROOT = str(Path(compose.__file__).parent.parent)
NOT_OBEYING = (str(Path(compose.__file__).parent), str(Path(__file__).parent))
# Read where a recipe becomes objects, before any run: which class, or where the run directory lies.
BY_COMPOSITION = {
    ("Recipe", "name"),
    ("Value", "path"),
    ("ScratchModel", "type"),
    ("PretrainedModel", "type"),
    ("PretrainedModel", "path"),
    ("Learner", "type"),
    ("Frozen", "type"),
    ("Scripted", "type"),
    ("Scorer", "type"),
}


def configs() -> list[type[BaseModel]]:
    found = [
        Recipe,
        sections.Value,
        sections.Chat,
        sections.ScratchModel,
        sections.PretrainedModel,
        sections.Sampling,
        sections.Optimizer,
        sections.Evaluate,
        sections.Checkpoint,
        sections.Hardware,
        sections.Report,
    ]
    for kind in registry.BUILT_IN:
        found += [registry.resolve(kind, name).Config for name in registry.BUILT_IN[kind] if name not in ABSENT]
    nested = {
        annotation
        for config in found
        for field in config.model_fields.values()
        for annotation in _classes(field.annotation)
    }
    return list(dict.fromkeys([*found, *sorted(nested, key=lambda each: each.__name__)]))


def owner(settings: type[BaseModel]) -> type[BaseModel]:
    """The class itself; for a variant that changes defaults only, the one whose code it shares."""
    return next((base for base in (GroupSettings, GroupKL) if issubclass(settings, base)), settings)


def _classes(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        if annotation not in (AlgorithmSettings, DataSettings, EngineSettings, EnvironmentSettings, RewardSettings):
            yield annotation
        return
    for part in getattr(annotation, "__args__", ()):
        yield from _classes(part)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()

    def watched(self: Any, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if not name.startswith("_") and name in type(self).model_fields:
            frame = sys._getframe(1)
            file = frame.f_code.co_filename
            if (
                file.startswith(ROOT)
                and not file.startswith(NOT_OBEYING)
                and not frame.f_code.co_name.startswith("_fits")
            ):
                found.add((owner(type(self)).__qualname__, name))
        return value

    monkeypatch.setattr(Strict, "__getattribute__", watched)
    return found


CALL = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 1}}</tool_call>'
REWARDS: dict[str, dict[str, Any]] = {  # scored in this process, where reads are seen
    "regex": {"pattern": "1"},
    "exact": {},
    "length": {"longest": 3},
    "format": {},
    "lexicon": {"words": {"a": 1.0}},
    "function": {"path": str(Path(__file__).parents[1] / "recipes/my_reward.py") + ":variety"},
    "judge": {"url": "http://127.0.0.1:9/v1", "model": "none", "retries": 1, "backoff": 0.001, "max_failed": 1.0},
}
OTHERS: list[dict[str, Any]] = [  # of other libraries, where they are installed
    given
    for given in (
        {"type": "textarena", "game": "GuessTheNumber-v0"},
        {"type": "gymnasium", "id": "FrozenLake-v1", "success_reward": 1.0, "settings": {"max_episode_steps": 1}},
        {"type": "gymnasium", "path": f"{RECIPES}/my_game.py:CopyWords", "success_reward": 1.0, "name": "copy"},
        {"type": "verifiers", "path": f"{RECIPES}/my_tasks.py:load"},
    )
    if importlib.util.find_spec(str(given["type"]))
]
PAIRS = {"path": "pairs.jsonl", "form": "pairs", "bad_rows": "exclude"}
RUNS: list[dict[str, Any]] = [
    {},
    {
        "algorithm": {
            "type": "ppo",
            "truncation": "terminal",
            "missing_end_penalty": 0.1,
            "reward_clip": [-1, 1],
            "reward_scale": True,
            "whiten_rewards": True,
            "kl": {"coef": 0.1, "target": 1.0},
            "target_kl": 10.0,
            "value_clip": 0.2,
            "value_pretraining": {"steps": 1, "explained_variance": 0.9},
            "importance": {"high": 2.0},
            "aggregation": "constant",
            "constant_length": 8,
        },
        "model": {"lora": {"rank": 2}},
        "sampling": {"tasks_per_step": 8, "max_tokens": 32, "stop": ["="]},
        "environments": [
            {"type": "arithmetic", "digits": 1},
            {"type": "guess", "weight": 8.0},
            {"type": "sentiment"},
            {"type": "code"},
            {"type": "tools"},
            {"type": "math"},
            {"type": "reasoning", "tasks": {"chain_sum": 1.0}},
            {"type": "sort_digits", "digits": 3, "name": "sort"},
            *OTHERS,
        ],
        "steps": 3,
    },
    {
        "environments": [{"type": "kuhn"}],
        "agents": {"first": {"type": "learner"}, "second": {"type": "frozen", "chat": {"template": "plain"}}},
        "sampling": {"tasks_per_step": 4, "max_new_tokens": 2},
    },
    {
        "environments": [{"type": "kuhn"}, {"type": "debate"}],
        "agents": {"second": {"type": "scripted", "player": "random"}},
        "sampling": {"tasks_per_step": 4, "max_new_tokens": 2},
    },
    {
        "environments": [{"type": "debate", "judge": "scores", "rounds": 1}],
        "rewards": [{"type": "length", "longest": 9, "weight": 0.0}],
        "agents": {"judge": {"type": "scorer", "reward": "length"}},
        "sampling": {"tasks_per_step": 2, "max_new_tokens": 2},
        "model": {"context": 512},
    },
    {"engine": {"type": "generate"}, "sampling": {"tasks_per_step": 2, "max_new_tokens": 2}},
    {
        "algorithm": {
            "type": "group",
            "scale": "batch",
            "dual_clip": 3.0,
            "overlong": {"limit": 4, "buffer": 2},
            "kl": {"coef": 0.1, "sync": {"every": 1}},
            "importance": {"low": 0.5},
        },
        "sampling": {"tasks_per_step": 2, "episodes_per_task": 2},
    },
    {"algorithm": {"type": "sft", "observation_weight": 0.5}, "data": {"type": "jsonl", "path": "chat.jsonl"}},
    {
        "algorithm": {"type": "sft"},
        "data": {"type": "json", "path": "completion.json", "form": "completion", "epochs": 1.0, "rows_per_step": 2},
        "steps": 0,
    },
    {
        "algorithm": {"type": "sft"},
        "data": {"type": "parquet", "path": "chat.parquet", "max_tokens": 30},
    },
    {"algorithm": {"type": "dpo", "label_smoothing": 0.1}, "data": {"type": "jsonl", **PAIRS}},
    {"algorithm": {"type": "reward_model"}, "data": {"type": "jsonl", **PAIRS}},
    {"algorithm": {"type": "sft"}, "data": {"type": "hub", "path": "owner/name"}},
    {
        "algorithm": {"type": "sft"},
        "data": {"type": "episodes", "path": "run0", "min_reward": -9.0, "component": "match"},
    },
]


def write_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the recipes in RUNS read from the working directory, and a hub that has the same rows."""
    from pyarrow import Table, parquet

    monkeypatch.chdir(folder)
    rows = [two_turns(f"{number}4") for number in range(5)]
    jsonl(folder / "chat.jsonl", rows)
    parquet.write_table(Table.from_pylist(rows), folder / "chat.parquet")
    (folder / "completion.json").write_text(json.dumps([{"prompt": f"{n}", "completion": "1"} for n in range(5)]))
    jsonl(folder / "pairs.jsonl", [pair_row("21"), pair_row("43"), {}])
    hub = SimpleNamespace(load_dataset=lambda *_, **__: rows)
    monkeypatch.setitem(sys.modules, "datasets", hub)  # type: ignore[arg-type]


def reward_model_run(folder: Path) -> Path:
    """What a reward of type reward_model is made of."""
    recipe = api.load_recipe("reward_model_smoke", ["steps=1", "hardware.threads=1"])
    return api.train(recipe, run_dir=folder / "reward_model", plain=True)


def test_every_field_is_read(tmp_path: Path, reads: set[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    from mrlm_cli.training import loop
    from mrlm_cli.training.stopping import Stopper

    with trainer(tmp_path / "refused", tiny(sampling={"max_tokens": 6, "max_new_tokens": 4})) as made:
        made.fitting.any = True  # as if others had fitted
        loop.iteration(made)  # no prompt fits, so the iteration is refused
    write_data(tmp_path, monkeypatch)
    for number, changes in enumerate(RUNS):
        recipe = tiny(**{"checkpoint": {"every": 1}, "steps": 1, **changes})
        with trainer(tmp_path / f"run{number}", recipe) as made:
            made.run.write_evaluation(0, {})
            loop.run(made, Stopper())
    pretrained = tiny(model={"type": "pretrained", "path": str(tmp_path / "run0/checkpoints/latest/policy")})
    pretrained = pretrained.model_copy(update={"name": "again"})
    with trainer(tmp_path / "pretrained", pretrained) as made:
        assert made.policy.value is not None
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(f'{{"problem": "{n}?", "answer": "{n}"}}\n' for n in range(9)))
    programs = tmp_path / "programs.jsonl"
    test = '[{"stdin": "", "stdout": "1"}]'
    programs.write_text("".join(f'{{"prompt": "print 1 {n}", "tests": {test}}}\n' for n in range(9)))
    for kind, field, given in (
        ("arithmetic", "form", {}),
        ("sentiment", "instruction", {}),
        ("math", "levels", {}),
        ("reasoning", "settings", {"tasks": {"chain_sum": 1.0}}),
        ("math", "test_path", {"path": str(problems)}),
        ("math", "checker", {"path": str(problems), "checker": "math_verify"}),
        ("code", "levels", {}),
        ("tools", "calls", {}),
        ("tools", "mcp", {"mcp": [{"command": [sys.executable, str(Path(__file__).with_name("mcp_server.py"))]}]}),
        ("code", "test_path", {"path": str(programs)}),
        *((str(given["type"]), "type", {key: given[key] for key in given if key != "type"}) for given in OTHERS),
    ):
        environment = registry.resolve("environments", kind)
        made_environment = environment(environment.Config(type=kind, **given))
        session = made_environment.open(made_environment.task("train", 0), 0)
        session.start()
        session.step(Reply(Message("assistant", CALL if "mcp" in given else "1"), "end"))
        assert made_environment.judging_seconds is None or made_environment.judging_seconds > 0
        assert field in environment.Config.model_fields
    transcript = Transcript(
        Task("t", "e", "train", 0, {"answer": "1"}), 0, {"policy": (Message("assistant", "1"),)}, (), {}, "done"
    )
    trained = reward_model_run(tmp_path)
    given_rewards = {
        "reward_model": {"path": str(trained)},
        "local_judge": {"path": str(tmp_path / "run4"), "max_failed": 1.0},
        **REWARDS,
    }
    rewards = [registry.resolve("rewards", kind).Config(type=kind, **given) for kind, given in given_rewards.items()]
    for config in rewards:
        reward = registry.resolve("rewards", config.type)(config)
        reward.prepare()
        for outcome in reward.score([transcript]):
            checked(outcome if config.type not in ("judge", "local_judge") else {"policy": 1.0}, transcript, config)
    body = {"choices": [{"message": {"content": "1"}}]}
    assert reward._read(SimpleNamespace(status_code=200, json=lambda: body)) == 1.0  # the judge, which was the last
    with Scorers(rewards, folders=[], workers=1, journal=NoJournal()) as scorers:
        assert scorers.score([]) == []
    declared = {(owner(config).__qualname__, name) for config in configs() for name in config.model_fields}
    unread = sorted(declared - reads - BY_COMPOSITION)
    assert not unread, f"settings that nobody reads: {unread}"


def test_a_field_that_no_body_reads_fails(reads: set[tuple[str, str]]) -> None:
    class Silent(Strict):
        dead: int = 1

    assert Silent().dead == 1  # read by a test, which does not count
    assert not reads

"""Small recipes and trainers for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mrlm_cli import registry
from mrlm_cli.events import Listener
from mrlm_cli.recipe import compose, sections
from mrlm_cli.recipe.agents import AGENTS
from mrlm_cli.recipe.schema import Recipe
from mrlm_cli.training.announce import Announcer
from mrlm_cli.training.rundir import RunDirectory
from mrlm_cli.training.stage import Stage, settled
from mrlm_cli.training.stopping import Stopper
from mrlm_cli.training.trainer import Trainer


def settings(kind: str, folder: Path = Path(), **fields: Any) -> Any:
    """The Config of a registered class."""
    return registry.resolve(kind, fields["type"], (folder,)).Config(**fields)


def tiny(folder: Path = Path(), **changes: Any) -> Recipe:
    """A recipe whose iteration takes some milliseconds; sections are replaced by dicts of fields."""
    fields: dict[str, Any] = {
        "name": "tiny",
        "steps": 3,
        "seed": 1,
        "model": {
            "type": "scratch",
            "layers": 1,
            "hidden": 32,
            "heads": 2,
            "context": 64,
            "characters": "0123456789sort =",
        },
        "environments": [{"type": "sort_digits", "digits": 3}],
        "sampling": {"tasks_per_step": 12, "max_new_tokens": 5},
        "algorithm": {"type": "ppo"},
        "optimizer": {"lr": 1e-3, "minibatches": 1, "tokens_per_micro_batch": 512},
        "evaluate": {"every": 0, "tasks": 8},
        "checkpoint": {"every": 0},
        "hardware": {"threads": 1, "device": "cpu", "deadline": 20.0},
        "engine": {"type": "cached"},
    }
    if "data" in changes:
        for unused in ("environments", "sampling", "engine"):
            del fields[unused]
    for key, value in changes.items():
        other_type = isinstance(value, dict) and value.get("type") not in (None, fields.get(key, {}).get("type"))
        fields[key] = (
            {**fields[key], **value} if isinstance(value, dict) and key in fields and not other_type else value
        )
    model = fields.pop("model")
    agents = {role: AGENTS[one["type"]](**one) for role, one in fields.pop("agents", {}).items()}
    data = fields.pop("data", None)
    engine = fields.pop("engine", None)
    parts: dict[str, Any] = {} if data is None else {"data": settings("data", folder, **data)}
    if "environments" in fields:
        given = fields.pop("environments")
        parts["environments"] = tuple(settings("environments", folder, **each) for each in given)
    if "rewards" in fields:
        parts["rewards"] = tuple(settings("rewards", folder, **each) for each in fields.pop("rewards"))
    if agents:
        parts["agents"] = agents
    if engine is not None:
        parts["engine"] = settings("engines", folder, **engine)
    kind = sections.ScratchModel if model["type"] == "scratch" else sections.PretrainedModel
    return Recipe(
        **{name: fields.pop(name) for name in ("name", "steps", "seed")},
        model=kind(**model),
        algorithm=settings("algorithms", folder, **fields.pop("algorithm")),
        **parts,
        **{name: getattr(sections, name.capitalize())(**value) for name, value in fields.items()},
    )


@contextmanager
def trainer(path: Path, recipe: Recipe, *listeners: Listener, folder: Path = Path()) -> Iterator[Trainer]:
    """A trainer over a new run directory, its engine loaded."""
    announce = Announcer(listeners)
    run = RunDirectory.create(path, recipe_yaml=compose.dump(settled(recipe)), origins={}, machine={})
    stopper = Stopper()
    with (
        Stage(settled(recipe), (folder,), journal=run.journal, check=stopper.check, phase=announce.phase) as stage,
        run.lock(),
    ):
        made = Trainer(settled(recipe), (folder,), stage, run, announce)
        made.refresh_engine()
        yield made

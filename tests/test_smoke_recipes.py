"""Every algorithm has a recipe that ends in seconds, which shows the method's own numbers and trains with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mrlm_cli import api, registry
from mrlm_cli.algorithms.group_settings import GroupSettings
from mrlm_cli.recipe import compose
from mrlm_cli.training.rundir import RunDirectory
from tests.group_helpers import VARIANTS

SMOKE = sorted(name for name in compose.shipped("recipes") if name.endswith("_smoke"))
NAMES = {
    "grpo": "grpo_smoke",
    "dr_grpo": "dr_grpo_smoke",
    "dapo": "dapo_smoke",
    "gspo": "gspo_smoke",
    "cispo": "cispo_smoke",
    "rloo": "rloo_smoke",
    "reinforce++": "reinforce_smoke",
    "reinforce++_baseline": "reinforce_baseline_smoke",
    "dpo": "online_dpo_smoke",
}
OPEN = {"overlong", "constant_length"}  # what a method leaves to the task: the limit of tokens


def settings(name: str) -> Any:
    return compose.load(name).recipe.algorithm


def test_every_algorithm_has_a_smoke_recipe() -> None:
    assert {settings(name).type for name in SMOKE} == set(registry.BUILT_IN["algorithms"])


@pytest.mark.parametrize("method", VARIANTS)
def test_a_methods_recipe_says_every_number_that_makes_it_that_method(method: str) -> None:
    owner = registry.resolve("algorithms", method).Config
    shown = settings(NAMES[method])
    changed = [
        key for key, field in owner.model_fields.items() if field.default != GroupSettings.model_fields[key].default
    ]
    assert set(changed) - {"type"} <= shown.model_fields_set
    given = {key: value for key, value in shown.model_dump().items() if key not in OPEN}
    plain = owner(type=method, **{key: getattr(shown, key) for key in OPEN & shown.model_fields_set}).model_dump()
    assert given == {key: value for key, value in plain.items() if key not in OPEN}


@pytest.mark.parametrize("name", sorted(NAMES.values()))
def test_it_ends_with_every_step_taken(tmp_path: Path, name: str) -> None:
    composed = api.load_recipe(name, ["hardware.threads=1"])
    rows = RunDirectory(api.train(composed, run_dir=tmp_path / "run", plain=True)).metrics()
    assert len(rows) == composed.recipe.steps == 3
    assert all(row["optimizer_steps"] == 4 and row["refused_steps"] == 0 for row in rows)
    moved = [row.get("policy_moved", abs(row.get("pair_margin", 0.0))) for row in rows]
    assert all(found > 0 for found in moved)
    if settings(name).type in ("grpo", "rloo", "reinforce++", "reinforce++_baseline"):
        assert abs(rows[0]["kl"]) < 1e-4 < abs(rows[-1]["kl"])  # the reference is the start
    assert (tmp_path / "run/checkpoints/latest/policy/model.safetensors").is_file()
    assert len(list((tmp_path / "run/eval").glob("*.json"))) == 2

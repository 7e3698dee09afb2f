"""Numbers that follow from a recipe agree with the models that are built from it."""

import json
import struct
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from mrlm_cli.errors import CheckpointError
from mrlm_cli.policy import load, pretrained
from mrlm_cli.policy.model import Policy
from mrlm_cli.policy.quiet import quiet
from mrlm_cli.recipe import compose, explain, json_schema, shape
from mrlm_cli.recipe.derived import derive
from mrlm_cli.recipe.schema import Recipe
from mrlm_cli.recipe.sections import ModelSection, Optimizer, PretrainedModel, ScratchModel
from tests.test_policy_families import FAMILIES


def test_the_quickstarts_numbers() -> None:
    derived = derive(
        compose.load("quickstart", ["optimizer.passes=2", "sampling.episodes_per_task=3", "steps=5"]).recipe
    )
    assert derived.episodes_per_step == 512 * 3
    assert derived.optimizer_steps_per_iteration == 2 * 4
    assert derived.optimizer_steps == 2 * 4 * 5
    assert derived.tokens_per_step_at_most == 512 * 3 * 256
    assert derived.chosen_tokens_per_step_at_most == 512 * 3 * 8  # the environment asks for one reply
    assert derive(compose.load("quickstart", ["sampling.max_tokens=64"]).recipe).tokens_per_step_at_most == 512 * 64


def test_several_turns_count_and_those_of_a_subclass_too(tmp_path: Path) -> None:
    turns = ["sampling.max_turns=7"]
    assert derive(compose.load("guess_ppo", turns).recipe).chosen_tokens_per_step_at_most == 512 * 7 * 3
    (tmp_path / "env.py").write_text(
        "from mrlm_cli.envs.sort_digits import SortDigits\n\n\nclass Mine(SortDigits):\n    pass\n"
    )
    recipe = tmp_path / "r.yaml"
    recipe.write_text(compose.shipped("recipes")["quickstart"].read_text().replace("sort_digits", "./env.py:Mine"))
    found = compose.load(recipe, turns)
    assert derive(found.recipe, found.folders).chosen_tokens_per_step_at_most == 512 * 7 * 8


def test_groups_that_may_be_refilled_count_as_often_as_they_may_be_sampled() -> None:
    for overrides, times in (
        ([], 3),
        (["sampling.refills=0"], 1),
        (["algorithm.filter_flat=false", "sampling.refills=4"], 1),
    ):
        derived = derive(compose.load("group_smoke", overrides).recipe)
        assert derived.episodes_per_step == 12 * 4
        assert derived.tokens_per_step_at_most == 12 * 4 * 64 * times
        assert derived.value_parameters == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden": 32, "layers": 1},
        {"hidden": 48, "layers": 3, "heads": 2, "mlp": 40, "value": {"head": "mlp"}},
        {"hidden": 32, "layers": 2, "tokenizer": "bytes", "value": {"type": "separate", "head": "mlp"}},
        {"hidden": 32, "layers": 1, "characters": "ab", "value": {"type": "separate"}},
    ],
)
def test_parameters_are_those_of_the_built_model(tmp_path: Path, settings: dict[str, object]) -> None:
    section = TypeAdapter(ModelSection).validate_python({"type": "scratch", **settings})
    policy, chat = load.build(section, seed=0, device="cpu", precision="float32", gradient_checkpointing=False)
    found = shape.of(section)
    assert found is not None
    assert found.parameters == sum(parameter.numel() for parameter in policy.lm.parameters())
    assert found.vocabulary == policy.vocabulary
    assert policy.value is not None
    assert shape.value_parameters(section, found) == sum(parameter.numel() for parameter in policy.value.parameters())
    load.save(policy, chat.tokenizer, tmp_path)
    again = shape.of(PretrainedModel(type="pretrained", path=str(tmp_path)))
    assert again == found  # from config.json and the header of the safetensors file


def test_a_model_that_is_not_here_leaves_numbers_unknown(tmp_path: Path) -> None:
    overrides = [f"model.path={tmp_path}/none", "model.type=pretrained"]
    (tmp_path / "r.yaml").write_text(
        compose.shipped("recipes")["quickstart"].read_text().replace("{type: scratch, layers: 2, hidden: 128}", "{}")
    )
    derived = derive(compose.load(tmp_path / "r.yaml", overrides).recipe)
    assert (derived.policy_parameters, derived.memory_estimate_mib, derived.tokens_per_step_at_most) == (None,) * 3
    assert derived.chosen_tokens_per_step_at_most == 512 * 8


@pytest.mark.parametrize("data", [b"", b"\x01", struct.pack("<Q", 10**12), struct.pack("<Q", 4) + b"[1]x"])
def test_a_broken_safetensors_file_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}))
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model.safetensors is not a readable"):
        shape.of(PretrainedModel(type="pretrained", path=str(tmp_path)))


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_broken_config_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config.json"):
        shape.of(PretrainedModel(type="pretrained", path=str(tmp_path)))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_reference_takes_the_bytes_that_are_counted(tmp_path: Path, family: str, moves: bool, precision: str) -> None:
    lm = pretrained.settled(FAMILIES[family]())
    with quiet():
        lm.save_pretrained(tmp_path)
    found = shape.of(PretrainedModel(type="pretrained", path=str(tmp_path)))
    assert found is not None
    reference = load.reference(Policy(lm, None, precision=precision), moves=moves)
    held = sum(parameter.numel() * parameter.element_size() for parameter in reference.parameters())
    assert shape.reference_bytes(found, precision, moves=moves) == held


def test_memory_counts_a_resting_reference_by_its_own_type() -> None:
    def memory(*overrides: str) -> int:
        found = derive(compose.load("quickstart", ["model.hidden=2048", *overrides]).recipe).memory_estimate_mib
        assert found is not None
        return found

    def reference(*overrides: str) -> int:
        return memory("algorithm.kl.coef=0.1", *overrides) - memory(*overrides)

    float32 = 2 * (4 * 2048**2 + 3 * 2048 * 4096) * 4 / 2**20  # two layers' matrices; the embedding is small
    assert reference() == pytest.approx(float32, rel=0.01)
    assert reference("hardware.precision=bfloat16") == pytest.approx(float32 / 2, rel=0.01)


def test_memory_grows_with_what_needs_it() -> None:
    def memory(*overrides: str) -> int:
        found = derive(compose.load("quickstart", ["model.hidden=512", *overrides]).recipe).memory_estimate_mib
        assert found is not None
        return found

    base = memory()
    assert memory("algorithm.kl.coef=0.1") > base  # a reference model
    assert memory("model.value.type=separate") > base
    assert memory("model.layers=8") > base
    assert memory("optimizer.tokens_per_micro_batch=65536") > base
    assert memory("optimizer.tokens_per_micro_batch=65536", "hardware.gradient_checkpointing=true") < memory(
        "optimizer.tokens_per_micro_batch=65536"
    )


def test_the_default_settings_of_every_section_are_explained() -> None:
    described = {setting.path: setting for setting in explain.settings()}
    for name in Optimizer.model_fields:
        assert described[f"optimizer.{name}"].sentence == Optimizer.model_fields[name].description
    assert described["optimizer.lr"].type == "number above 0, at most 1"
    assert described["optimizer.max_grad_norm"].type == "number above 0, or null"
    assert described["optimizer.schedule"].type == "one of constant, linear, cosine"
    assert (
        described["optimizer.betas"].type == "list of 2: number of at least 0, below 1; number of at least 0, below 1"
    )
    assert (described["steps"].default, described["optimizer.warmup"].default) == ("0", "0")


def test_every_setting_has_a_sentence() -> None:
    assert [setting.path for setting in explain.settings() if not setting.sentence.endswith(".")] == []


def test_the_json_schema_knows_every_key() -> None:
    schema = json_schema.recipe_schema()
    assert set(schema["properties"]) == {*Recipe.model_fields, "include"}
    branches = schema["properties"]["environments"]["items"]["anyOf"]
    digits = next(branch for branch in branches if branch["properties"]["type"].get("const") == "sort_digits")
    assert digits["properties"]["digits"]["type"] == "integer"
    assert digits["additionalProperties"] is False
    text = json.dumps(schema)
    references = {part.partition('"')[0] for part in text.split('"$ref": "#/$defs/')[1:]}
    assert references
    assert references <= set(schema["$defs"])
    assert set(schema["required"]) == {"name", "model", "algorithm"}


def test_a_scratch_section_of_each_tokenizer_has_its_vocabulary() -> None:
    assert shape.of(ScratchModel(type="scratch", tokenizer="bytes")).vocabulary == 259  # type: ignore[union-attr]

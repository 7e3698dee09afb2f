"""What a person does: train, look, evaluate, load elsewhere; and what goes wrong for them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mrlm_cli import api
from mrlm_cli.errors import CheckpointError, MrlmError, UserError
from mrlm_cli.metrics import describe
from mrlm_cli.training import targets
from mrlm_cli.training.rundir import RunDirectory

SMALL = ["hardware.threads=1"]


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smoke")
    with inside(folder):
        return folder / api.train(api.load_recipe("ppo_smoke", SMALL), plain=True)


@pytest.mark.xdist_group("smoke")
def test_the_run_directory_holds_what_it_should(smoke: Path) -> None:
    rows = [json.loads(line) for line in (smoke / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    unknown = {name for row in rows for name in row if describe(name) is None}
    assert not unknown, f"metrics that nobody explains: {unknown}"
    assert sorted(path.name for path in (smoke / "eval").iterdir()) == [f"step-00000{n}.json" for n in (0, 2, 4)]
    stored = [json.loads(line) for line in (smoke / "episodes/step-000004.jsonl").read_text().splitlines()]
    assert len(stored) == 8
    for one in stored:
        assert len(one["tokens"]) == len(one["logprobs"]) == len(one["rewards"])
        assert one["transcript"]["task"]["split"] == "train"
    checkpoint = smoke / "checkpoints/latest"
    assert os.readlink(checkpoint) == "step-000004"
    assert not list(smoke.rglob("*.bin")) + list(smoke.rglob("*.pt")) + list(smoke.rglob("*.pkl"))
    assert set(json.loads((checkpoint / "manifest.json").read_text())) >= {"files"}


@pytest.mark.xdist_group("smoke")
def test_the_policy_loads_in_plain_transformers_on_any_text(smoke: Path) -> None:
    policy = smoke / "checkpoints/latest/policy"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
    for text in ("sort 31=", "Ünknown ☃ characters\x00", "1-9?"):
        inputs = tokenizer(text, return_tensors="pt")
        assert set(inputs) == {"input_ids", "attention_mask"}
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert out.shape[1] >= inputs["input_ids"].shape[1] + 1
    assert tokenizer.decode(tokenizer("sort 31=").input_ids) == "sort 31="
    assert torch.isfinite(model(**tokenizer("sort 31=", return_tensors="pt")).logits).all()


@pytest.mark.xdist_group("smoke")
def test_a_run_a_checkpoint_and_a_model_directory_evaluate_alike(smoke: Path, tmp_path: Path) -> None:
    with inside(tmp_path):
        run = api.evaluate(str(smoke))
        checkpoint = api.evaluate(str(smoke / "checkpoints/step-000004"))
        model = shutil.copytree(smoke / "checkpoints/latest/policy", tmp_path / "model")
        plain = api.evaluate(str(model), recipe="ppo_smoke", overrides=SMALL)
        best = api.evaluate(str(smoke), best=True)
    assert run.split == "test"
    assert run.step == checkpoint.step == 4
    assert run.components == checkpoint.components == plain.components
    assert run.reward == plain.reward
    assert set(run.pass_at) == {1, 2}
    assert set(run.environments) == {"sort_digits", "guess"}
    assert best.step in (2, 4)
    data = json.loads(json.dumps(run.to_json()))
    assert set(data["reward"]) == {"mean", "low", "high"}
    assert {"checkpoint", "step", "split", "tasks", "components", "pass_at", "length", "truncated"} <= set(data)
    assert api.evaluate(str(smoke), overrides=["evaluate.tasks=3"]).tasks < run.tasks


@pytest.mark.xdist_group("smoke")
def test_a_run_may_start_from_another_with_kl_zero(smoke: Path, tmp_path: Path) -> None:
    (tmp_path / "chain.yaml").write_text(
        f"name: chain\nsteps: 1\nmodel: {{type: pretrained, path: {smoke}}}\n"
        "environments: [{type: sort_digits, digits: 4}]\n"
        "sampling: {tasks_per_step: 8, max_new_tokens: 6}\n"
        "algorithm: {type: ppo, kl: {coef: 0.1}}\nhardware: {threads: 1}\nevaluate: {every: 0, tasks: 4}\n"
    )
    with inside(tmp_path):
        run = api.train(api.load_recipe("chain.yaml"), plain=True)
        row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(row["kl"]) < 1e-5


@pytest.mark.xdist_group("smoke")
def test_what_exists_is_never_overwritten(smoke: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in smoke.rglob("*")}
    with inside(smoke.parent.parent), pytest.raises(UserError, match="mrlm resume"):
        api.train(api.load_recipe("ppo_smoke", SMALL), plain=True)
    with inside(smoke.parent.parent), pytest.raises(UserError, match="another recipe"):
        api.train(api.load_recipe("ppo_smoke", [*SMALL, "seed=9"]), continue_run=True, plain=True)
    assert {path: path.stat().st_mtime_ns for path in smoke.rglob("*")} == before


@pytest.mark.xdist_group("smoke")
@pytest.mark.parametrize(
    ("change", "told"),
    [("remove", "model.safetensors"), ("flip", "model.safetensors"), ("manifest", "manifest.json")],
)
def test_a_broken_checkpoint_is_named(smoke: Path, tmp_path: Path, change: str, told: str) -> None:
    broken = shutil.copytree(smoke / "checkpoints/step-000004", tmp_path / "step-000004")
    if change == "remove":
        (broken / "policy/model.safetensors").unlink()
    elif change == "flip":
        data = bytearray((broken / "policy/model.safetensors").read_bytes())
        data[-3] ^= 4
        (broken / "policy/model.safetensors").write_bytes(bytes(data))
    else:
        (broken / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=told):
        api.evaluate(str(broken))


def test_a_failed_build_leaves_no_run_behind(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: nothing\nsteps: 1\nmodel: {type: pretrained, path: models/absent}\n"
        "environments: [{type: sort_digits}]\nalgorithm: {type: ppo}\n"
    )
    with inside(tmp_path), pytest.raises(UserError, match="models/absent"):
        api.train(api.load_recipe(recipe), plain=True)
    assert not (tmp_path / "runs").exists()


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file, not a folder")
    with inside(tmp_path), pytest.raises(MrlmError, match="runs"):
        api.train(api.load_recipe("ppo_smoke", SMALL), plain=True)
    assert (tmp_path / "runs").read_text() == "a file, not a folder"


def test_a_target_that_is_none(tmp_path: Path) -> None:
    with inside(tmp_path):
        with pytest.raises(UserError, match="--recipe"):
            api.evaluate("nowhere")
        (tmp_path / "empty").mkdir()
        with pytest.raises(MrlmError):
            api.evaluate("empty", recipe="ppo_smoke")


def test_an_environment_of_ones_own_trains_in_worker_processes(tmp_path: Path) -> None:
    overrides = [*SMALL, "steps=2", "sampling.tasks_per_step=8", "evaluate.every=0", "optimizer.minibatches=1"]
    with inside(tmp_path):
        run = api.train(api.load_recipe("my_env_ppo", overrides), plain=True)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [row["failed_rate"] for row in rows] == [0, 0]
        assert json.loads((run / "origin.json").read_text())["plugins"]
        assert api.evaluate(str(run), overrides=["evaluate.tasks=7"]).tasks == 7


@pytest.mark.xdist_group("smoke")
@pytest.mark.parametrize("pruned", ["recipe.yaml", "policy"])
def test_a_checkpoint_pruned_under_an_evaluation_gives_way_to_the_newest(
    smoke: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pruned: str
) -> None:
    run = shutil.copytree(smoke, tmp_path / "run", symlinks=True)
    newest, checkpoints = targets.find(run, False)[1], run / "checkpoints"
    assert newest is not None
    older = shutil.copytree(newest, checkpoints / "step-000003")
    found = iter([older, newest])

    def find(path: Path, best: bool) -> tuple[RunDirectory, Path]:
        chosen = next(found)
        if chosen == older:
            shutil.rmtree(older)
        return RunDirectory.open(path), chosen

    monkeypatch.setattr(targets, "find", find)
    assert api.evaluate(str(run), overrides=["evaluate.tasks=3"]).step == 4
    monkeypatch.setattr(targets, "find", lambda path, best: (RunDirectory.open(path), newest))
    for place in newest.rglob(pruned):
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    with pytest.raises(MrlmError):  # still there and broken: no newer one would help
        api.evaluate(str(run), overrides=["evaluate.tasks=3"])

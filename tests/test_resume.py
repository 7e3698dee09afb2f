"""A run that was killed, stopped or extended ends with the bits of an undisturbed one."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

RECIPE = """
name: run
seed: 5
steps: 8
model: {type: scratch, layers: 1, hidden: 32, heads: 2, context: 64, characters: "0123456789sort =", value: {head: mlp}}
environments: [{type: sort_digits, digits: 3}]
sampling: {tasks_per_step: 16, episodes_per_task: 2, max_new_tokens: 5}
algorithm: {type: ppo, reward_scale: true, kl: {coef: 0.05, target: 1.0, horizon: 100},
            entropy: {coef: 0.02, schedule: linear}}
optimizer: {lr: 3.0e-3, schedule: linear, warmup: 2, passes: 2, minibatches: 2, tokens_per_micro_batch: 128,
            weight_decay: 0.01}
evaluate: {every: 3, tasks: 12}
checkpoint: {every: 2, keep: 2}
hardware: {threads: 1, device: cpu}
report: {episodes: 2, episodes_every: 3}
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}


def mrlm(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mrlm_cli", *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(folder: Path, *arguments: str, code: int = 0) -> str:
    process = mrlm(folder, *arguments)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    return output


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in row.items()
        if not (name == "seconds" or name.endswith("_seconds") or "per_second" in name or "memory" in name)
    }


def outcome(run: Path) -> dict[str, Any]:
    """All that must be equal: weights, optimizer, state, metrics, evaluations, stored episodes."""
    last = run / "checkpoints" / "latest"
    files = sorted(path for path in last.rglob("*") if path.suffix == ".safetensors" or path.name == "state.json")
    return {
        "last": last.resolve().name,
        "best": (run / "checkpoints" / "best").resolve().name,
        "files": {str(path.relative_to(last)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        "metrics": [timeless(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()],
        "evaluations": {
            path.name: timeless({k: v for k, v in json.loads(path.read_text()).items() if k != "checkpoint"})
            for path in sorted((run / "eval").iterdir())
        },
        "episodes": {path.name: path.read_text() for path in sorted((run / "episodes").iterdir())},
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], float]:
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "recipe.yaml").write_text(RECIPE)
    begun = time.monotonic()
    finish(folder, "train", "recipe.yaml")
    seconds = time.monotonic() - begun
    found = outcome(folder / "runs" / "run")
    assert [row["step"] for row in found["metrics"]] == list(range(1, 9))
    assert sorted(found["evaluations"]) == [f"step-{step:06d}.json" for step in (0, 3, 6, 8)]
    assert {name for name in found["files"] if name.endswith(".safetensors")} == {
        "optimizer.safetensors",
        "policy/model.safetensors",
        "value.safetensors",
    }
    return found, seconds


@pytest.mark.xdist_group("resume")
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_moments_it_ends_with_the_same_bits(
    tmp_path: Path, undisturbed: tuple[dict[str, Any], float], seed: int
) -> None:
    expected, seconds = undisturbed
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    moments = random.Random(seed)
    run = tmp_path / "runs" / "run"
    kills = 0
    for _ in range(3):
        process = mrlm(tmp_path, "train", "recipe.yaml", "--continue")
        wanted = moments.randint(1, 6)  # lines of metrics.jsonl after which the kill comes, at a random delay
        begun = time.monotonic()
        while process.poll() is None and time.monotonic() - begun < 60 + 3 * seconds:
            if run.exists() and len((run / "metrics.jsonl").read_bytes().splitlines()) >= wanted:
                break
            time.sleep(0.005)
        time.sleep(moments.random() * 0.1)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate(timeout=60)
    assert kills >= 1
    finish(tmp_path, "resume", "runs/run")
    assert outcome(run) == expected


@pytest.mark.xdist_group("resume")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_exits_and_the_rest_follows(
    tmp_path: Path, undisturbed: tuple[dict[str, Any], float], number: signal.Signals, code: int
) -> None:
    expected, _ = undisturbed
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    run = tmp_path / "runs" / "run"
    process = mrlm(tmp_path, "train", "recipe.yaml")
    while process.poll() is None and not (run.exists() and (run / "metrics.jsonl").read_bytes().count(b"\n") >= 1):
        time.sleep(0.005)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert "mrlm resume" in output
    saved = (run / "checkpoints" / "latest").resolve().name
    assert saved == f"step-{(run / 'metrics.jsonl').read_bytes().count(chr(10).encode()):06d}"
    finish(tmp_path, "resume")
    assert outcome(run) == expected


@pytest.mark.xdist_group("resume")
def test_a_finished_run_is_left_alone_or_extended(tmp_path: Path, undisturbed: tuple[dict[str, Any], float]) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    finish(tmp_path, "train", "recipe.yaml", "steps=2")
    run = tmp_path / "runs" / "run"
    before = outcome(run)
    finish(tmp_path, "resume")
    assert outcome(run) == before
    assert "exists" in finish(tmp_path, "train", "recipe.yaml", code=2)
    assert outcome(run) == before
    finish(tmp_path, "resume", "runs/run", "steps=3")
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    assert "steps" in (run / "resumes.jsonl").read_text()
    output = finish(tmp_path, "resume", "runs/run", "optimizer.lr=1.0", code=2)
    assert "may change only" in output


@pytest.mark.xdist_group("resume")
def test_links_that_a_kill_left_behind_are_set_right(tmp_path: Path, undisturbed: tuple[dict[str, Any], float]) -> None:
    expected, _ = undisturbed
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    finish(tmp_path, "train", "recipe.yaml")
    checkpoints = tmp_path / "runs/run/checkpoints"
    for link in ("latest", "best"):
        (checkpoints / link).unlink()
    (checkpoints / "latest").symlink_to("step-000006")
    finish(tmp_path, "resume")
    assert outcome(tmp_path / "runs/run") == expected


@pytest.mark.xdist_group("resume")
def test_an_evaluation_that_a_signal_cut_off_still_decides_the_best(
    tmp_path: Path,
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    finish(tmp_path, "train", "recipe.yaml", "steps=6", "optimizer.schedule=constant")
    run = tmp_path / "runs/run"
    best = os.readlink(run / "checkpoints/best")
    (run / "eval/step-000006.json").unlink()
    state = run / "checkpoints/step-000006/state.json"
    assert json.loads(state.read_text())["best"]["step"] == 6
    (run / "checkpoints/best").unlink()
    shutil.rmtree(run / "checkpoints/step-000006")
    finish(tmp_path, "resume")
    assert os.readlink(run / "checkpoints/best") == best
    assert (run / "eval/step-000006.json").is_file()


@pytest.mark.xdist_group("resume")
def test_a_broken_newest_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, undisturbed: tuple[dict[str, Any], float]
) -> None:
    expected, _ = undisturbed
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    finish(tmp_path, "train", "recipe.yaml")
    run = tmp_path / "runs" / "run"
    place = run / "checkpoints" / "step-000008" / "policy" / "model.safetensors"
    data = bytearray(place.read_bytes())
    data[len(data) // 2] ^= 1
    place.write_bytes(bytes(data))
    output = finish(tmp_path, "resume")
    assert "step-000008" in output
    assert outcome(run) == expected

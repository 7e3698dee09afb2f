"""Minutes of real training: the quickstart learns, and with shuffled rewards it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mrlm_cli import api
from tests.benchmarks.shuffled_control import control

pytestmark = pytest.mark.slow


def test_the_quickstart_learns_by_reward_alone(tmp_path: Path) -> None:
    run = api.train(api.load_recipe("quickstart"), run_dir=tmp_path / "run", plain=True)
    before = json.loads((run / "eval/step-000000.json").read_text())["components"]["exact"]
    assert before["mean"] < 0.01
    found = api.evaluate(str(run))
    assert found.split == "test"
    assert found.tasks == 500
    assert found.components["exact"].mean >= 0.9


def test_shuffled_rewards_teach_nothing(tmp_path: Path) -> None:
    evaluations = control(tmp_path, "quickstart", ["steps=100", "evaluate.every=0"])
    assert [one.step for one in evaluations] == [0, 100]
    assert evaluations[-1].components["exact"].mean < 0.01
    assert evaluations[-1].reward.mean < 0.35


def test_reward_lifts_what_forty_demonstrations_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the second recipe finds the first one's run
    start = api.train(api.load_recipe("sort_sft"), plain=True)
    before = api.evaluate(str(start), recipe="sort_grpo").components["exact"]
    after = api.evaluate(str(api.train(api.load_recipe("sort_grpo"), plain=True))).components["exact"]
    assert 0.1 < before.mean < 0.6
    assert after.low > before.high + 0.1

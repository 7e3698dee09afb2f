"""Evaluation: the mean, its interval, pass@k, and what is left out."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from mrlm_cli.draws import uniforms
from mrlm_cli.envs.sort_digits import SortDigits
from mrlm_cli.errors import UserError
from mrlm_cli.training.evaluate import _pass_at, evaluate, interval
from mrlm_cli.training.examine import examine
from mrlm_cli.training.source import held_out, mixture
from mrlm_cli.training.summary import unknown_share
from tests.kit import settings, tiny, trainer


def test_interval_is_a_bootstrap_over_tasks() -> None:
    values = [float(uniforms(b"k", i)[0] < 0.3) for i in range(400)]
    found = interval(values, "exact", 0)
    spread = 1.96 * np.std(values) / np.sqrt(400)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.low == pytest.approx(found.mean - spread, abs=0.006)
    assert found.high == pytest.approx(found.mean + spread, abs=0.006)
    assert interval(values, "exact", 0) == found


def test_interval_of_equal_values() -> None:
    assert interval([0.0] * 300, "exact", 0).high == pytest.approx(0.01)
    assert interval([1.0] * 300, "exact", 0).low == pytest.approx(0.99)
    assert interval([0.25] * 9, "reward", 0).low == interval([0.25] * 9, "reward", 0).high == 0.25


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(tmp_path: Path) -> None:
    with trainer(tmp_path / "run", tiny()) as made:
        episodes = made.source.episodes(0)
    from dataclasses import replace

    def marked(right: list[bool]) -> list[object]:
        return [
            replace(one, transcript=replace(one.transcript, rewards=(("policy", 0, "exact", float(yes)),)))
            for one, yes in zip(episodes, right, strict=False)
        ]

    tasks = {"a": [True, False, False, False], "b": [False] * 4, "c": [True, True, False, True]}
    found = _pass_at({name: marked(right) for name, right in tasks.items()}, 4)  # type: ignore[misc]
    for k in (1, 2, 4):
        share = [np.mean([any(subset) for subset in combinations(right, k)]) for right in tasks.values()]
        assert found[k] == pytest.approx(np.mean(share))


def test_evaluation_repeats_itself_and_counts_each_task_once(tmp_path: Path) -> None:
    recipe = tiny(evaluate={"every": 0, "tasks": 20, "episodes_per_task": 2, "temperature": 1.0})
    with trainer(tmp_path / "run", recipe) as made:
        results = []
        for _ in range(2):
            made.engine.load(made.policy.lm)
            results.append(
                evaluate(made._judged, made.environments, recipe.evaluate, split="test", seed=1, step=0, checkpoint="x")
            )
    (first, episodes), (second, again) = results
    assert episodes == again
    assert first.components == second.components
    assert first.tasks == len({one.task.id for one in episodes}) == 20
    assert len(episodes) == 40
    assert set(first.pass_at) == {1, 2}
    assert first.reward.mean == pytest.approx(np.mean([sum(one.rewards) for one in episodes]))
    assert any(a.tokens != b.tokens for a, b in zip(episodes[::2], episodes[1::2], strict=True))


def test_held_out_tasks_are_shared_by_weight_and_mixtures_follow_it(tmp_path: Path) -> None:
    recipe = tiny(
        environments=[
            {"type": "sort_digits", "name": "three", "digits": 3, "weight": 3.0},
            {"type": "sort_digits", "name": "four", "digits": 4, "weight": 1.0},
        ]
    )
    with trainer(tmp_path / "run", recipe) as made:
        tasks = held_out(made.environments, "validation", 40)
        assert [task.env for task in tasks] == ["three"] * 30 + ["four"] * 10
        drawn = mixture(made.environments, 4000, 1, "mixture", 0)
        assert drawn.count("three") == pytest.approx(3000, abs=100)
        assert drawn == mixture(made.environments, 4000, 1, "mixture", 0)
        made.evaluate()
        stored = json.loads((made.run.path / "eval/step-000000.json").read_text())
    assert set(stored["environments"]) == {"three", "four"}
    assert settings("environments", type="sort_digits").label == "sort_digits"


def test_parts_of_a_mixture_are_shown_beside_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny(evaluate={"every": 1, "tasks": 21, "temperature": 1.0})
    with trainer(tmp_path / "run", recipe) as made:
        monkeypatch.setattr(SortDigits, "part", lambda self, task: "even" if task.index % 2 == 0 else "odd")
        made.engine.load(made.policy.lm)
        found, episodes = evaluate(
            made._judged, made.environments, recipe.evaluate, split="test", seed=1, step=0, checkpoint="x"
        )
    assert list(found.environments) == ["sort_digits/even", "sort_digits/odd"]
    for rest, part in enumerate(found.environments):
        rewards = [sum(one.rewards) for one in episodes if one.task.index % 2 == rest]
        assert len(rewards) == 11 - rest
        assert found.environments[part]["match"].mean == pytest.approx(np.mean(rewards))


def test_a_target_without_a_recipe_is_told_what_was_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.yaml").write_text("name: some\n")
    (tmp_path / "runs" / "some" / "checkpoints").mkdir(parents=True)
    (tmp_path / "model").mkdir()
    told = {
        "some.yaml": "some.yaml is a recipe; expected what it trained",
        "some": "did you mean runs/some?",
        "other": "other is no run or checkpoint here; a model brings no tasks: say which with --recipe",
        "quickstart": "quickstart is a recipe; expected what it trained",
        "model": "model brings no tasks",
    }
    for target, text in told.items():
        with pytest.raises(UserError) as error:
            examine(target, None, (), False)
        assert text in str(error.value)


def test_text_that_the_tokenizer_does_not_know_is_told(tmp_path: Path) -> None:
    with trainer(
        tmp_path / "run", tiny(model={"type": "scratch", "layers": 1, "hidden": 32, "characters": "01234="})
    ) as made:
        episodes = made.source.episodes(0)
        share = unknown_share(episodes, made._tokenizer, said=False)
        warned: list[str] = []
        made.announce.warned = warned.append  # type: ignore[method-assign]
        made.note_unknown(episodes)
        made.step = 1
        made.note_unknown(episodes)
    assert 0.3 < share < 1
    assert [f"{share:.1%} of the tokens" in text for text in warned] == [True]
    with trainer(tmp_path / "other", tiny()) as made:
        assert unknown_share(made.source.episodes(0), made._tokenizer, said=False) == 0

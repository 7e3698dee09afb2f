"""Group methods inside a run: refill, a moving reference, gradients that depend on no cut, and exact resumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mrlm_cli import api
from mrlm_cli.recipe.sections import Sampling
from mrlm_cli.records import Batch, Episode, Progress, Task
from mrlm_cli.strict import EnvironmentSettings
from mrlm_cli.training import loop
from mrlm_cli.training.rollout import Draw
from mrlm_cli.training.rundir import RunDirectory
from mrlm_cli.training.source import RolloutSource
from mrlm_cli.training.stopping import Stopper
from mrlm_cli.training.trainer import Trainer
from tests.group_helpers import EXTRA, VARIANTS
from tests.kit import tiny, trainer
from tests.test_group import episode
from tests.test_resume import timeless
from tests.test_training_rollout import _Counting
from tests.test_training_update import credited, distance, gradient

PAIRS = {"tasks_per_step": 6, "episodes_per_task": 2}


class Fake:
    """Tasks of an index below 4 have two different rewards, the others equal ones."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[int], int, int]] = []

    def episodes(self, tasks: Sequence[Task], samples: int, draw: Draw, temperature: float) -> list[Episode]:
        self.calls.append(([task.index for task in tasks], draw.attempt, draw.first))
        return [
            replace(
                episode(float(task.index < 4 and sample > 0)),
                session=f"{number}.{sample}",
                group=task.id,
                task=task,
                sample=sample,
                attempt=draw.attempt,
            )
            for number, task in enumerate(tasks, draw.first)
            for sample in range(samples)
        ]


def flat(group: Sequence[Episode]) -> str | None:
    return "flat" if len({sum(one.rewards) for one in group}) == 1 else None


def source(refills: int, tasks: int = 3) -> tuple[RolloutSource, Fake]:
    fake, environment = Fake(), _Counting(EnvironmentSettings(type="counting"))
    sampling = Sampling(tasks_per_step=tasks, episodes_per_task=2, refills=refills)
    return RolloutSource(fake, {"counting": environment}, sampling, 3, flat), fake  # type: ignore[arg-type]


def test_refills_take_the_next_tasks_in_order_and_as_many_as_are_missing() -> None:
    made, fake = source(refills=50)
    plain, reference = source(refills=0, tasks=70)
    plain.episodes(0)
    order = reference.calls[0][0]
    for step in range(4):
        found = made.episodes(step)
        kept = [one for one in found if one.left_out is None]
        assert [one.session for one in kept] == sorted((one.session for one in kept), key=lambda name: float(name))
        assert len({one.session.split(".")[0] for one in kept}) == 3
        assert all((one.left_out is None) == (one.task.index < 4) for one in found)
        assert len({one.session for one in found}) == len(found)
    taken = [index for indices, _, _ in fake.calls for index in indices]
    assert taken == order[: len(taken)]
    assert len(taken) > 12  # some were refilled
    for indices, attempt, first in fake.calls:
        assert (attempt == 0) == (first == 0)
        assert len(indices) == 3 if attempt == 0 else len(indices) <= 3
    assert made.state() == {"cursor": {"counting": len(taken)}}


@pytest.mark.parametrize("refills", [0, 1])
def test_what_is_short_after_the_last_refill_stays_short(refills: int) -> None:
    made, fake = source(refills=refills)
    attempts = []
    for step in range(12):
        before = len(fake.calls)
        found = made.episodes(step)
        attempts.append(len(fake.calls) - before)
        missing = 3 - sum(one.left_out is None for one in found) // 2
        assert attempts[-1] <= refills + 1
        assert missing == 0 or attempts[-1] == refills + 1
    assert max(attempts) == refills + 1


def test_a_step_with_refills_repeats_from_its_cursor() -> None:
    made, fake = source(refills=9)
    made.episodes(0)
    state = made.state()
    expected, calls = made.episodes(1), fake.calls[:]
    again, other = source(refills=9)
    again.load_state(state)
    assert again.episodes(1) == expected
    assert other.calls == calls[-len(other.calls) :]


def test_a_task_that_comes_twice_is_judged_once_with_all_its_episodes() -> None:
    made, _ = source(refills=0, tasks=14)  # two epochs of seven tasks
    found = made.episodes(0)
    assert len(found) == 28
    assert sum(one.left_out is None for one in found) == 16


class Judge:
    """An algorithm's `keep` that leaves out whatever it is told to."""

    def __init__(self, reason: str | None) -> None:
        self.reason = reason

    def __call__(self, group: Sequence[Episode]) -> str | None:
        return self.reason


def test_a_step_without_any_kept_group_is_skipped_and_nothing_moves(tmp_path: Path) -> None:
    recipe = tiny(algorithm={"type": "dapo"}, sampling={**PAIRS, "refills": 2}, optimizer={"passes": 2})
    with trainer(tmp_path / "run", recipe) as made:
        made.source._keep = Judge("flat")
        before = {name: p.detach().clone() for name, p in made.policy.named_parameters()}
        for _ in range(7):  # more than optimizer.max_refused: nothing is wrong here
            loop.iteration(made)
            made.end_if_given_up()
        rows = made.run.metrics()
        assert made.source.state() == {"cursor": {"sort_digits": 7 * 3 * 6}}
    assert all(torch.equal(p, before[name]) for name, p in made.policy.named_parameters())
    for row in rows:
        assert (row["episodes"], row["groups"], row["filtered_groups"], row["refilled_groups"]) == (0, 0, 18, 12)
        assert (row["skipped_steps"], row["sampled_tokens"] > 0) == (2, True)
        assert "refused_steps" not in row


def test_filtered_groups_are_measured_and_stored_but_not_trained_on(tmp_path: Path) -> None:
    recipe = tiny(
        algorithm={"type": "dapo"},
        environments=[{"type": "sort_digits", "digits": 2}],
        sampling={"tasks_per_step": 8, "episodes_per_task": 2, "refills": 3},
        report={"episodes": 1000},
    )
    with trainer(tmp_path / "run", recipe) as made:
        sampled: list[list[Episode]] = []
        taking = made.source.episodes

        def watched(step: int) -> list[Episode]:
            sampled.append(taking(step))
            return sampled[-1]

        made.source.episodes = watched  # type: ignore[method-assign]
        trained: list[Batch] = []
        credit = made.algorithm.credit

        def seen(batch: Batch, progress: Progress) -> Any:
            trained.append(batch)
            return credit(batch, progress)

        made.algorithm.credit = seen  # type: ignore[method-assign]
        loop.iteration(made)
        row = made.run.metrics()[0]
        assert len((tmp_path / "run/episodes/step-000001.jsonl").read_text().splitlines()) == len(sampled[0])
    left_out = [one for one in sampled[0] if one.left_out is not None]
    assert left_out, "the test needs a flat group"
    assert trained[0].episode.tolist() == [n for n, one in enumerate(sampled[0]) if one.left_out is None]
    assert row["episodes"] == len(sampled[0]) - len(left_out) == 2 * row["groups"]
    assert row["filtered_groups"] == len(left_out) / 2
    assert row["refilled_groups"] == sum(one.attempt > 0 for one in sampled[0]) / 2 > 0
    assert row["reward"] == pytest.approx(sum(sum(one.rewards) for one in sampled[0]) / len(sampled[0]))
    assert row["sampled_tokens"] == sum(len(one.chosen) for one in sampled[0])


@pytest.mark.parametrize("name", VARIANTS)
def test_the_gradient_depends_on_no_micro_batch(tmp_path: Path, name: str) -> None:
    settings = {"type": name, "entropy": {"coef": 0.01}, "importance": {"high": 1.5}, **EXTRA.get(name, {})}
    sampling = {**PAIRS, "refills": 0} if name == "dapo" else PAIRS
    with trainer(tmp_path / "run", tiny(algorithm=settings, sampling=sampling)) as made:
        assert made.policy.value is None
        made.source._keep = Judge(None)
        batch = credited(made)
        made.policy.to(torch.float64)
        noise = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.3
        assert batch.old_logprobs is not None
        assert batch.advantages is not None
        batch = batch.replace(
            old_logprobs=(batch.old_logprobs + noise * batch.mask).double(),
            advantages=(batch.advantages + noise * batch.mask).double(),
        )
        whole = gradient(made, batch, 10**6)
        assert whole.norm() > 0
        assert distance(gradient(made, batch, 1), whole) < 1e-6
        assert distance(gradient(made, batch, 40), whole) < 1e-6


MOVING = {"every": 2, "rate": 0.25}
RUNS: dict[str, dict[str, Any]] = {
    **{name: {"type": name, **EXTRA.get(name, {})} for name in VARIANTS},
    "rloo, moving reference": {"type": "rloo", "kl": {"coef": 0.1, "sync": MOVING}},
    "ppo, moving reference": {"type": "ppo", "kl": {"coef": 0.1, "sync": {"every": 3}}},
    "dpo, online": {"type": "dpo"},
    "grpo in bfloat16": {"type": "grpo"},
    "ppo in bfloat16": {"type": "ppo", "kl": {"coef": 0.1}},
    "group, with a moving reference and every part on": {
        "type": "group",
        "baseline": "leave_one_out",
        "scale": "batch",
        "whiten": True,
        "dual_clip": 3.0,
        "aggregation": "sequence",
        "filter_flat": True,
        "overlong": {"limit": 5, "buffer": 2},
        "kl": {"coef": 0.1, "form": "k3+", "sync": MOVING},
        "entropy": {"coef": 0.01, "schedule": "linear"},
        "importance": {"form": "mask"},
        "target_kl": 0.1,
    },
}


def finished(path: Path, recipe: Any, start: Path | None = None) -> tuple[Trainer, list[dict[str, Any]]]:
    with trainer(path, recipe) as made:
        if start is not None:
            made.load(start)
            for row in RunDirectory(start.parents[1]).metrics()[: made.step]:
                made.run.append_metrics(row.pop("step"), row)
        loop.run(made, Stopper())
        return made, [timeless(row) for row in made.run.metrics()]


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_has_the_bits_of_an_undisturbed_one(tmp_path: Path, name: str) -> None:
    recipe = tiny(
        algorithm=RUNS[name],
        environments=[{"type": "sort_digits", "digits": 2}],
        sampling={"tasks_per_step": 4, "episodes_per_task": 4}
        | ({"refills": 2} if "filter_flat" in RUNS[name] or name == "dapo" else {}),
        optimizer={"lr": 1e-2, "passes": 2, "minibatches": 2},
        steps=5,
        checkpoint={"every": 3, "keep": 2},
        evaluate={"every": 0, "tasks": 1},
        hardware={"precision": "bfloat16" if "bfloat16" in name else "float32"},
    )
    whole, expected = finished(tmp_path / "whole", recipe)
    begun = tmp_path / "whole/checkpoints/step-000003"
    resumed, found = finished(tmp_path / "resumed", recipe, begun)
    assert found == expected
    assert expected[0].get("kl", 0) == 0  # the reference is the start, whatever its precision
    assert resumed.source.state() == whole.source.state()
    for one, two in ((whole.policy, resumed.policy), (whole.reference, resumed.reference)):
        if one is not None and two is not None:
            assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    assert (begun / "reference").is_dir() == ("moving" in name)
    assert any(row.get("optimizer_steps", 0) > 0 for row in expected[:3])
    assert any(row.get("optimizer_steps", 0) > 0 for row in expected[3:])


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
@pytest.mark.parametrize("rate", [0.25, 1.0])
def test_the_reference_follows_the_policy_every_so_many_steps(tmp_path: Path, algorithm: str, rate: float) -> None:
    settings = {"type": algorithm, "kl": {"coef": 0.1, "sync": {"every": 2, "rate": rate}}}
    with trainer(tmp_path / "run", tiny(algorithm=settings, sampling=PAIRS, optimizer={"lr": 1e-2})) as made:
        assert made.reference is not None
        expected = {name: p.detach().clone().double() for name, p in made.policy.lm.named_parameters()}
        for step in range(1, 5):
            loop.iteration(made)
            policy = dict(made.policy.lm.named_parameters())
            if step % 2 == 0:
                expected = {name: (1 - rate) * p + rate * policy[name].double() for name, p in expected.items()}
            for name, p in made.reference.lm.named_parameters():
                assert not p.requires_grad
                torch.testing.assert_close(p.double(), expected[name], rtol=1e-6, atol=1e-7)
                if rate == 1.0 and step % 2 == 0:
                    assert torch.equal(p, policy[name])
                    assert p.data_ptr() != policy[name].data_ptr()
        rows = made.run.metrics()
    assert [row["reference_synced"] for row in rows] == [0, 1, 0, 1]
    if rate == 1.0:
        assert abs(rows[2]["kl"]) < 1e-5  # the step after a copy
        assert abs(rows[1]["kl"]) > 1e-3
        assert abs(rows[3]["kl"]) > 1e-3


def test_without_sync_the_reference_stays_and_no_checkpoint_holds_it(tmp_path: Path) -> None:
    recipe = tiny(algorithm={"type": "grpo"}, sampling=PAIRS, optimizer={"lr": 1e-2})
    with trainer(tmp_path / "run", recipe) as made:
        before = {name: p.detach().clone() for name, p in made.policy.lm.named_parameters()}
        loop.iteration(made)
        made.save()
        assert made.reference is not None
        assert all(torch.equal(p, before[name]) for name, p in made.reference.lm.named_parameters())
        assert not (made.run.checkpoints / "latest" / "reference").exists()
        assert not (made.run.checkpoints / "latest" / "value.safetensors").exists()
        assert "reference_synced" not in made.run.metrics()[0]


def test_the_smoke_recipe_filters_refills_and_moves_its_reference(tmp_path: Path) -> None:
    run = api.train(api.load_recipe("group_smoke"), run_dir=tmp_path / "run", plain=True)
    rows = RunDirectory(run).metrics()
    assert [row["reference_synced"] for row in rows] == [0, 1, 0, 1]
    assert all(row["groups"] + row["filtered_groups"] == 12 + row["refilled_groups"] for row in rows)
    assert sum(row["refilled_groups"] for row in rows) > 0
    assert all(row["optimizer_steps"] == 4 and row["refused_steps"] == 0 for row in rows)
    assert (run / "checkpoints/latest/reference/policy/model.safetensors").is_file()

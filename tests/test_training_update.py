"""The update: what it depends on, and what it must not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mrlm_cli.errors import NonFiniteError
from mrlm_cli.events import Listener
from mrlm_cli.records import Batch, PolicyOut, Progress
from mrlm_cli.training.annotate import Gap, annotate
from mrlm_cli.training.collate import collate, micro_batches
from mrlm_cli.training.loop import iteration, run
from mrlm_cli.training.stopping import Stopper
from mrlm_cli.training.trainer import Trainer
from tests.kit import tiny, trainer

KL = {"type": "ppo", "kl": {"coef": 0.05}, "entropy": {"coef": 0.01}}


def credited(made: Trainer) -> Batch:
    """A batch of fresh episodes, ready for an update."""
    batch = collate(made.source.episodes(0), "cpu")
    assert batch is not None
    batch = batch.replace(logprobs=batch.logprobs.to(next(made.policy.parameters()).dtype))
    batch, _ = annotate(
        batch, made.policy, made.reference, made.algorithm.needs, temperature=1.0, budget=512, phase=lambda *_: None
    )
    batch, _ = made.algorithm.credit(batch, Progress(0, 3))
    return batch


def gradient(made: Trainer, batch: Batch, budget: int) -> torch.Tensor:
    """The whole gradient of one optimizer step, flat, float64; the parameters do not move."""
    taken: list[torch.Tensor] = []
    made.updater._settings = made.recipe.optimizer.model_copy(update={"tokens_per_micro_batch": budget})
    made.updater._adam.step = lambda: taken.append(  # type: ignore[method-assign]
        torch.cat([p.grad.double().flatten() for p in made.policy.parameters() if p.grad is not None])
    )
    made.updater._optimizer_step(batch, Progress(0, 3))
    return taken[0]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def scrambled(batch: Batch) -> Batch:
    """Other lengths of old log-probs and returns, so that no term is zero by symmetry."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(batch.mask.shape, generator=generator, dtype=torch.float64).to(batch.rewards.dtype) * 0.3
    assert batch.old_logprobs is not None
    assert batch.returns is not None
    assert batch.advantages is not None
    return batch.replace(
        old_logprobs=batch.old_logprobs + noise * batch.mask,
        returns=batch.returns + noise * batch.mask,
        advantages=batch.advantages + noise * batch.mask,
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_gradient_depends_on_neither_micro_batch_nor_order_nor_padding(
    tmp_path: Path, dtype: torch.dtype, tolerance: float, aggregation: str
) -> None:
    recipe = tiny(algorithm={"type": "ppo", "aggregation": aggregation, "entropy": {"coef": 0.01}})
    with trainer(tmp_path / "run", recipe) as made:
        batch = scrambled(credited(made))
        made.policy.to(dtype)
        assert len(set(batch.lengths.tolist())) > 1, "the test needs ragged episodes"
        whole = gradient(made, batch, 10**6)
        assert distance(gradient(made, batch, 1), whole) < tolerance
        assert distance(gradient(made, batch, 40), whole) < tolerance
        order = torch.tensor([(5 * row + 3) % 12 for row in range(12)])
        assert distance(gradient(made, batch.rows(order), 60), whole) < tolerance
        assert distance(gradient(made, padded(batch, 7), 10**6), whole) < tolerance


def padded(batch: Batch, columns: int) -> Batch:
    fields = {}
    for name in Batch.__dataclass_fields__:
        value = getattr(batch, name)
        if value is not None and value.ndim == 2:
            fields[name] = torch.nn.functional.pad(value, (0, columns), value=0)
    return batch.replace(**fields)


def test_micro_batches_hold_every_row_once_within_the_budget(tmp_path: Path) -> None:
    with trainer(tmp_path / "run", tiny()) as made:
        batch = collate(made.source.episodes(0), "cpu")
    assert batch is not None
    cuts = micro_batches(batch, 40)
    assert sorted(torch.cat(cuts).tolist()) == list(range(12))
    assert all(len(rows) * int(batch.lengths[rows].max()) <= 40 for rows in cuts)
    assert [int(batch.lengths[rows].max()) for rows in cuts] == sorted(
        (int(batch.lengths[rows].max()) for rows in cuts), reverse=True
    )
    pairs = micro_batches(batch.replace(unit=torch.arange(12) // 2), 1)
    assert all(len(rows) == 2 and len({int(row) // 2 for row in rows}) == 1 for rows in pairs)


def test_at_the_first_optimizer_step_ratio_is_one_and_kl_zero(tmp_path: Path) -> None:
    with trainer(tmp_path / "run", tiny(algorithm=KL)) as made:
        iteration(made)
        row = made.run.metrics()[-1]
    assert abs(row["approx_kl"]) < 1e-9
    assert row["policy_moved"] < 1e-6
    assert row["clip_fraction"] == 0
    assert abs(row["kl"]) < 1e-6
    assert row["sampler_gap_max"] < 1e-4


def test_later_iterations_move_away_from_the_reference(tmp_path: Path) -> None:
    with trainer(tmp_path / "run", tiny(algorithm=KL, optimizer={"lr": 1e-2, "passes": 2})) as made:
        for _ in range(3):
            iteration(made)
        rows = made.run.metrics()
    assert abs(rows[-1]["kl"]) > 1e-3
    assert rows[-1]["policy_moved"] > 1e-3
    assert all(row["sampler_gap_max"] < 1e-4 for row in rows)


def test_a_learning_rate_of_zero_leaves_the_log_ratio_at_zero(tmp_path: Path) -> None:
    with trainer(tmp_path / "run", tiny(optimizer={"passes": 3, "minibatches": 2})) as made:
        for group in made.updater._adam._adam.param_groups:
            group["peak"] = 0.0
        iteration(made)
        row = made.run.metrics()[-1]
    assert row["optimizer_steps"] == 6
    assert row["policy_moved"] < 1e-6


@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_what_is_not_finite_leaves_the_parameters_and_stops_after_some_in_a_row(tmp_path: Path, where: str) -> None:
    recipe = tiny(optimizer={"minibatches": 2, "max_refused": 3})
    with trainer(tmp_path / "run", recipe) as made:
        before = {name: p.detach().clone() for name, p in made.policy.named_parameters()}
        gain = made.policy.lm.base_model.norm.weight  # matrices' gradients do not pass through autograd
        if where == "gradient":
            gain.register_hook(lambda gradient: gradient * float("nan"))
        else:
            credit = made.algorithm.credit

            def poisoned(batch: Batch, progress: Progress) -> object:
                batch, sums = credit(batch, progress)
                assert batch.advantages is not None
                return batch.replace(advantages=batch.advantages * float("inf")), sums

            made.algorithm.credit = poisoned  # type: ignore[method-assign, assignment]
        with pytest.raises(NonFiniteError, match="3 in a row"):
            run(made, Stopper())
        rows = made.run.metrics()
        assert [row["refused_steps"] for row in rows] == [2, 1]
        assert [row["optimizer_steps"] for row in rows] == [0, 0]
        for name, p in made.policy.named_parameters():
            assert torch.equal(p, before[name]), name
        assert (made.run.checkpoints / "latest").resolve().name == "step-000002"  # a resume goes on behind it


def test_a_value_that_is_not_finite_refuses_the_iteration_and_names_the_episode(tmp_path: Path) -> None:
    heard: list[str] = []

    class Ear(Listener):
        def warned(self, text: str) -> None:
            heard.append(text)

    with trainer(tmp_path / "run", tiny(), Ear()) as made:
        forward = made.policy.forward

        def broken(*args: object, **kwargs: object) -> object:
            out = forward(*args, **kwargs)  # type: ignore[arg-type]
            if not torch.is_grad_enabled() and out.values is not None:
                out.values[0] = float("nan")
            return out

        made.policy.forward = broken  # type: ignore[method-assign, assignment]
        iteration(made)
    assert any("not finite" in text and "episodes" in text for text in heard)


def with_logprobs(batch: Batch, value: float) -> torch.Tensor:
    """The batch's log-probs [B,T], `value` at the first chosen token of the first row."""
    found = batch.logprobs.clone()
    found[0, batch.mask[0].nonzero()[0]] = value
    return found


@pytest.mark.parametrize("order", [(torch.nan, -3.0), (-3.0, torch.nan)])
def test_the_gap_keeps_a_nan_wherever_it_comes(tmp_path: Path, order: tuple[float, float]) -> None:
    with trainer(tmp_path / "run", tiny()) as made:
        batch = credited(made)
        gap = Gap()
        assert gap.finite
        for value in order:
            gap.add(batch, with_logprobs(batch, value))
    assert not gap.finite
    found = gap.sums().means()
    assert math.isnan(found["sampler_gap"])
    assert math.isnan(found["sampler_gap_max"])


@pytest.mark.parametrize("wrong", [torch.nan, -torch.inf])
def test_a_log_prob_that_is_not_finite_refuses_the_step_also_where_it_carries_no_weight(
    tmp_path: Path, wrong: float
) -> None:
    heard: list[str] = []

    class Ear(Listener):
        def warned(self, text: str) -> None:
            heard.append(text)

    recipe = tiny(
        algorithm={"type": "grpo", "truncation": "mask", "kl": {"coef": 0.0}},
        sampling={"tasks_per_step": 6, "episodes_per_task": 4, "max_new_tokens": 3},  # an untrained policy is cut
    )
    with trainer(tmp_path / "run", recipe, Ear()) as made:
        forward, broken = made.policy.forward, []

        def weightless(tokens: torch.Tensor, lengths: torch.Tensor, score: torch.Tensor, **options: Any) -> PolicyOut:
            out: PolicyOut = forward(tokens, lengths, score, **options)
            if not broken:
                broken.append(True)
                row = int((lengths == lengths.max()).nonzero()[0])  # the longest replies are the cut ones
                out.logprobs.data[row, score[row].nonzero()[0]] = wrong
            return out

        made.policy.forward = weightless  # type: ignore[method-assign, assignment]
        before = {name: p.detach().clone() for name, p in made.policy.named_parameters()}
        iteration(made)
        assert broken
        assert made.run.metrics()[0]["refused_steps"] == 1
        assert all(torch.equal(p, before[name]) for name, p in made.policy.named_parameters())
    assert [text for text in heard if "a log-prob that is not finite; episodes" in text]


@pytest.mark.parametrize("sound", [True, False])
def test_the_engine_is_released_before_scoring_and_has_weights_again_after_the_update(
    tmp_path: Path, sound: bool
) -> None:
    happened: list[str] = []

    def told(name: str, work: Callable[..., Any]) -> Any:
        def doing(*arguments: Any, **options: Any) -> Any:
            if happened[-1:] != [name]:
                happened.append(name)
            return work(*arguments, **options)

        return doing

    with trainer(tmp_path / "run", tiny(algorithm=KL)) as made:
        assert made.reference is not None
        scoring = made.reference.forward

        def scored(*arguments: Any, **options: Any) -> PolicyOut:
            out: PolicyOut = scoring(*arguments, **options)
            return out if sound else replace(out, logprobs=out.logprobs * torch.nan)

        for name in ("generate", "release", "load"):
            setattr(made.engine, name, told(name, getattr(made.engine, name)))
        made.policy.forward = told("forward", made.policy.forward)  # type: ignore[method-assign]
        made.reference.forward = told("forward", scored)  # type: ignore[method-assign]
        made._adam.step = told("step", made._adam.step)  # type: ignore[method-assign]
        iteration(made)
        iteration(made)
    assert happened == 2 * ["generate", "release", "forward", *(["step"] if sound else []), "load"]


def test_value_pretraining_leaves_the_policy_bit_for_bit(tmp_path: Path) -> None:
    algorithm = {"type": "ppo", "value_pretraining": {"steps": 1}}
    with trainer(tmp_path / "run", tiny(algorithm=algorithm, optimizer={"weight_decay": 0.1})) as made:
        before = {name: p.detach().clone() for name, p in made.policy.named_parameters()}
        iteration(made)
        moved = {name for name, p in made.policy.named_parameters() if not torch.equal(p, before[name])}
        assert moved
        assert all(name.startswith("value.") for name in moved)
        iteration(made)
        assert any(not torch.equal(p, before[name]) for name, p in made.policy.lm.named_parameters(prefix="lm"))
        assert [row["value_pretraining"] for row in made.run.metrics()] == [1, 0]


def test_minibatches_are_equal_parts_and_keep_groups_together(tmp_path: Path) -> None:
    recipe = tiny(sampling={"tasks_per_step": 6, "episodes_per_task": 2}, optimizer={"minibatches": 3})
    with trainer(tmp_path / "run", recipe) as made:
        batch = credited(made)
        passes = [made.updater._minibatches(batch, Progress(0, 3), number) for number in range(2)]
        for parts in passes:
            assert [len(part.tokens) for part in parts] == [4, 4, 4]
            assert sorted(row for part in parts for row in part.episode.tolist()) == list(range(12))
            seen = [set(part.group.tolist()) for part in parts]
            assert sum(len(groups) for groups in seen) == 6  # none is split
        assert passes[0][0].episode.tolist() != passes[1][0].episode.tolist()


@pytest.mark.parametrize("limit", [1e-9, 10.0])
def test_nothing_is_computed_after_the_optimizer_step_that_went_beyond_target_kl(tmp_path: Path, limit: float) -> None:
    recipe = tiny(
        algorithm={"type": "ppo", "target_kl": limit},
        optimizer={"lr": 1e-2, "passes": 2, "minibatches": 2, "tokens_per_micro_batch": 4096},
    )
    with trainer(tmp_path / "run", recipe) as made:
        batch, forwards = credited(made), []
        made.policy.register_forward_hook(lambda *_: forwards.append(1))
        metrics = made.updater.update(batch, Progress(0, 3)).means()
    # The first of the four cannot have moved yet; the second is measured before it moves.
    steps = 2 if limit < 1 else 4
    assert (len(forwards), metrics["optimizer_steps"], metrics["stopped_early"]) == (steps, steps, steps == 2)

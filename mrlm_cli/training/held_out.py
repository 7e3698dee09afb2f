"""Held-out rows of a dataset: an algorithm's loss and measures, with intervals that resample rows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mrlm_cli import registry
from mrlm_cli.algorithms.base import Algorithm, Judged
from mrlm_cli.draws import integer
from mrlm_cli.errors import CheckpointError, UserError
from mrlm_cli.events import Estimate, Evaluation
from mrlm_cli.policy import load
from mrlm_cli.policy.model import Policy
from mrlm_cli.recipe.schema import Recipe
from mrlm_cli.records import Batch, Episode, Progress
from mrlm_cli.training.checkpoint import state
from mrlm_cli.training.collate import collate, micro_batches
from mrlm_cli.training.dataset import DatasetSource
from mrlm_cli.training.evaluate import RESAMPLES, NothingToJudge
from mrlm_cli.training.reference import CachedReference
from mrlm_cli.training.stage import Stage


def ratio(sums: Sequence[float], counts: Sequence[float], name: str, seed: int) -> Estimate:
    """Σ sums / Σ counts with a 95 % percentile bootstrap interval over units; the resampling is keyed as elsewhere."""
    over, under = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    generator = np.random.Generator(np.random.PCG64(integer(2**63, seed, "bootstrap", name)))
    drawn = [generator.integers(0, len(over), len(over)) for _ in range(RESAMPLES)]
    means = [over[rows].sum() / under[rows].sum() for rows in drawn if under[rows].sum() > 0]
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(float(over.sum() / under.sum()), float(low), float(high))


def evaluate_rows(
    episodes: Sequence[Episode],
    policy: Policy,
    reference: CachedReference | None,
    algorithm: Algorithm,
    recipe: Recipe,
    step: int,
    checkpoint: str,
) -> tuple[Evaluation, list[Episode]]:
    """Judge the policy on held-out rows. Raises NothingToJudge if none of them fits the limits."""
    begun = time.perf_counter()
    if not isinstance(algorithm, Judged):
        raise UserError(f"algorithm {recipe.algorithm.type} has no method judge, so held-out rows cannot be judged")
    needs = algorithm.needs
    batch = collate(episodes, recipe.hardware.device, pairs=needs.pairs, observed=needs.observed)
    if batch is None:
        raise NothingToJudge(f"no held-out row can be judged; the first: {episodes[0].failure}")
    if reference is not None:
        batch = batch.replace(ref_logprobs=reference.logprobs(batch, episodes))
    batch, _ = algorithm.credit(batch, Progress(step, recipe.steps))
    found = _measured(algorithm, policy, batch, recipe.optimizer.tokens_per_micro_batch)
    components = {
        name: ratio(sums, counts, name, recipe.seed) for name, (sums, counts) in found.items() if sum(counts) > 0
    }
    if "loss" not in components:
        raise NothingToJudge("no held-out row carries weight")
    rows = len(batch.unit.unique())
    evaluation = Evaluation(
        checkpoint=checkpoint,
        step=step,
        split=episodes[0].task.split,
        tasks=rows,
        failed=len({one.group for one in episodes}) - rows,
        reward=None,
        components=components,
        pass_at={},
        length=float(batch.mask.sum() / len(batch.lengths)),
        truncated=0.0,
        seconds=time.perf_counter() - begun,
    )
    return evaluation, list(episodes)


def of_checkpoint(
    stage: Stage, recipe: Recipe, folders: Sequence[Path], checkpoint: Path
) -> tuple[Evaluation, list[Episode]]:
    """Judge a checkpoint on the test rows; `stage` holds the model from which its run started, the reference.

    Raises UserError if no row is held out, CheckpointError if that model is not the one that it was.
    """
    assert stage.loaded is not None
    assert recipe.data is not None
    algorithm = registry.resolve("algorithms", recipe.algorithm.type, folders)(recipe.algorithm)
    source = DatasetSource(stage.loaded, stage.chat, recipe.data, recipe.seed, lambda text: None)
    rows = source.held_out(recipe.evaluate.tasks, "test")
    if not rows:
        raise UserError(
            "the run's recipe keeps no rows for a test: train with data.test_share above 0 or data.test_path, or judge "
            "it by tasks, with --recipe RECIPE"
        )
    stored = state(checkpoint)
    reference = None
    if algorithm.needs.reference:
        if stored["reference_sha256"] not in (None, load.fingerprint(stage.policy)):
            raise CheckpointError(
                f"{checkpoint}: the model from which the run started has changed since; its margins would be others"
            )
        budget = recipe.optimizer.tokens_per_micro_batch
        reference = CachedReference(load.reference(stage.policy), source, budget=budget)
    load.load_weights(stage.policy, checkpoint)
    return evaluate_rows(rows, stage.policy, reference, algorithm, recipe, int(stored["step"]), str(checkpoint))


@torch.no_grad()
def _measured(
    algorithm: Judged, policy: Policy, batch: Batch, budget: int
) -> dict[str, tuple[list[float], list[float]]]:
    """name -> (sums, counts) of every unit, in the order of the micro-batches."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    needs = algorithm.needs
    for rows in micro_batches(batch, budget):
        part = batch.rows(rows)
        out = policy(
            part.tokens,
            part.lengths,
            part.score,
            temperature=1.0,
            entropy=False,
            logprobs=needs.logprobs,
            values=needs.values,
        )
        for name, (sums, counts) in algorithm.judge(out, part).items():
            over, under = found.setdefault(name, ([], []))
            over.extend(sums.tolist())
            under.extend(counts.tolist())
    return found

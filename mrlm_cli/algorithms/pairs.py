"""Preference pairs in a batch: in each unit, the row of the highest and the row of the lowest reward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mrlm_cli.metrics import Sums
from mrlm_cli.records import Batch

if TYPE_CHECKING:
    from torch import Tensor


def pairs(batch: Batch) -> tuple[Tensor, Tensor]:
    """(preferred rows [P], other rows [P]) in the order of the units' first rows, as int64.

    A unit of one row, or of equal rewards, makes no pair. The pairs of data carry the rewards 1 and 0; the episodes of
    a group are ranked by what the environment paid.
    """
    units: dict[int, list[int]] = {}
    for row, unit in enumerate(batch.unit.tolist()):
        units.setdefault(unit, []).append(row)
    rewards = batch.rewards.double().sum(1).tolist()
    preferred, other = [], []
    for rows in units.values():
        best, worst = max(rows, key=lambda row: rewards[row]), min(rows, key=lambda row: rewards[row])
        if rewards[best] > rewards[worst]:
            preferred.append(best)
            other.append(worst)
    return batch.unit.new_tensor(preferred), batch.unit.new_tensor(other)


def weighed(batch: Batch) -> tuple[Batch, Sums]:
    """The batch with weight 1 at the chosen tokens of paired rows, mass 1 a pair (on its preferred row), else 0."""
    preferred, other = pairs(batch)
    counted = batch.mass.new_zeros(len(batch.mass))
    counted[preferred] = counted[other] = 1.0
    rows = batch.unit.unique(return_counts=True)[1]
    alone, units = (rows < 2).sum(), (rows > 1).sum()
    sums = Sums()
    sums.add("tied_rate", units - len(preferred), units)
    sums.add("lone_episodes", alone)
    weights = batch.mask.to(counted.dtype) * counted[:, None]
    return batch.replace(weights=weights, mass=counted.index_fill(0, other, 0.0)), sums


def measured(preferred: Tensor, other: Tensor, loss: Tensor) -> Sums:
    """Metrics of pairs from the scores of their two sides and their losses, [P] each."""
    sums, count = Sums(), len(loss)
    sums.add("loss", loss.detach().sum(), count)
    sums.add("pair_accuracy", right(preferred - other).sum(), count)
    sums.add("pair_margin", (preferred - other).detach().sum(), count)
    sums.add("preferred_reward", preferred.detach().sum(), count)
    sums.add("other_reward", other.detach().sum(), count)
    return sums


def judged(preferred: Tensor, other: Tensor, loss: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Loss, accuracy and margin of each held-out pair, each counted once."""
    one = loss.new_ones(len(loss))
    return {"loss": (loss, one), "accuracy": (right(preferred - other), one), "margin": (preferred - other, one)}


def right(margin: Tensor) -> Tensor:
    """1 where the margin is positive, ½ where there is none: guessing, not failing.  [P] -> [P]."""
    return (margin > 0).to(margin.dtype) + 0.5 * (margin == 0).to(margin.dtype)

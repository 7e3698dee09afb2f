"""Passes × minibatches × micro-batches: the parameters move here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

from mrlm_cli.algorithms.base import Algorithm
from mrlm_cli.draws import shuffled
from mrlm_cli.metrics import Sums
from mrlm_cli.policy.model import Policy
from mrlm_cli.recipe.sections import Optimizer
from mrlm_cli.records import Batch, Progress
from mrlm_cli.training.annotate import Gap
from mrlm_cli.training.collate import micro_batches, unit_rows
from mrlm_cli.training.optim import Adam

LAST_ONLY = ("policy_moved",)  # a metric of the last optimizer step, where the others are over all of them


class Refused(Exception):
    """An optimizer step was not taken; `episodes` (indices of the step's) are to blame."""

    def __init__(self, what: str, episodes: list[int]) -> None:
        super().__init__(what)
        self.episodes = episodes


class Skipped(Exception):
    """An optimizer step was not taken because no episode of its minibatch carries weight: nothing is wrong."""


class Updater:
    """Trains on one iteration's batch."""

    def __init__(
        self,
        policy: Policy,
        algorithm: Algorithm,
        adam: Adam,
        settings: Optimizer,
        *,
        temperature: float,
        seed: int,
        phase: Callable[[str, int, int], None],
        refused: Callable[[Refused], None],
    ) -> None:
        self._policy = policy
        self._algorithm = algorithm
        self._adam = adam
        self._settings = settings
        self._temperature = temperature
        self._seed = seed
        self._phase = phase
        self._refused = refused  # told of every refusal
        self.refused_in_a_row = 0

    def update(self, batch: Batch, progress: Progress, *, measures_gap: bool = False) -> Sums:
        """Every optimizer step of an iteration; a refused one leaves the parameters bit for bit as they were.

        Ends early once an algorithm says stop, or `gave_up`. Where nothing was scored before, the gap to the sampler's
        log-probs is measured on the forward of the first optimizer step, before it moves anything.
        """
        sums = Sums()
        sums.add("lr", self._adam.schedule(progress))
        done = refused = skipped = 0
        last = Sums()
        stopped = False
        total = self._settings.passes * self._settings.minibatches
        for pass_number in range(self._settings.passes):
            for part in self._minibatches(batch, progress, pass_number):
                self._phase("update", done + refused + skipped, total)
                try:
                    gap = Gap() if measures_gap and done == 0 else None
                    last = self._optimizer_step(part, progress, gap)
                except Refused as error:
                    refused += 1
                    self.refuse(error)
                    if self.gave_up:
                        break
                    continue
                except Skipped:
                    skipped += 1
                    continue
                done += 1
                self.refused_in_a_row = 0
                if gap is not None:
                    sums.update(gap.sums())
                for name, (total_sum, count) in last:
                    if name not in LAST_ONLY:
                        sums.add(name, total_sum, count)
                if stopped := self._algorithm.stop(last.means()):
                    break
            if stopped or self.gave_up:
                break
        for name, (total_sum, count) in last:
            if name in LAST_ONLY:
                sums.add(name, total_sum, count)
        sums.add("optimizer_steps", done)
        sums.add("refused_steps", refused)
        sums.add("skipped_steps", skipped)
        sums.add("stopped_early", float(stopped))
        return sums

    @property
    def gave_up(self) -> bool:
        """Whether so many optimizer steps in a row were refused that the run should end."""
        return self.refused_in_a_row >= self._settings.max_refused

    def refuse(self, error: Refused) -> None:
        """Count a refusal and tell the listener."""
        self.refused_in_a_row += 1
        self._refused(error)

    def _minibatches(self, batch: Batch, progress: Progress, pass_number: int) -> list[Batch]:
        """The batch in `minibatches` parts of equal numbers of units, in an order of their own for each pass.

        Whole groups are shuffled, so that a group's rows mostly meet in one part: what they begin with in common is
        then computed once.
        """
        units, group_of = unit_rows(batch), batch.group.tolist()
        groups: dict[int, list[int]] = {}
        for unit, rows in units.items():
            groups.setdefault(group_of[rows[0]], []).append(unit)
        shuffled_groups = shuffled(list(groups), self._seed, "minibatches", progress.step, pass_number)
        order = [unit for group in shuffled_groups for unit in groups[group]]
        count = min(self._settings.minibatches, len(order))
        bounds = [round(number * len(order) / count) for number in range(count + 1)]
        return [
            batch.rows(
                torch.tensor([row for unit in order[begin:end] for row in units[unit]], device=batch.unit.device)
            )
            for begin, end in pairwise(bounds)
        ]

    def _optimizer_step(self, batch: Batch, progress: Progress, gap: Gap | None = None) -> Sums:
        # Both denominators are sums over the whole optimizer step, taken before its first backward: the gradient then
        # depends on no micro-batch boundary.
        mass = batch.mass.sum()
        tokens = (batch.weights > 0).sum()
        if mass <= 0 or tokens == 0:
            raise Skipped
        value_only = self._algorithm.value_only(progress)
        needs = self._algorithm.needs
        sums = Sums()
        self._adam.zero()
        with self._policy.steady(adds=True):
            for rows in micro_batches(batch, self._settings.tokens_per_micro_batch):
                part = batch.rows(rows)
                out = self._policy(
                    part.tokens,
                    part.lengths,
                    part.score,
                    temperature=self._temperature,
                    entropy=needs.entropy,
                    logprobs=needs.logprobs and not value_only,
                    value_only=value_only,
                )
                if gap is not None:
                    gap.add(part, out.logprobs)
                    if not gap.finite:  # also where it carries no weight, and so is not in the loss
                        self._adam.zero()
                        raise Refused("a log-prob that is not finite", _culprits(out.logprobs, None, part))
                if needs.old and part.old_logprobs is None:
                    part = part.replace(old_logprobs=out.logprobs.detach())
                parts, metrics = self._algorithm.loss(out, part, progress)
                loss = parts["mass"] / mass + parts["tokens"] / tokens
                if not torch.isfinite(loss):
                    self._adam.zero()
                    raise Refused(f"a loss of {loss.item()}", _culprits(out.logprobs, out.values, part))
                loss.backward()
                sums.update(metrics)
        norm = self._adam.clip()
        if not torch.isfinite(norm):
            self._adam.zero()
            raise Refused(f"a gradient norm of {norm.item()}", [])
        self._adam.step()
        self._adam.zero()
        sums.add("grad_norm", norm)
        return sums


def _culprits(logprobs: torch.Tensor, values: torch.Tensor | None, part: Batch) -> list[int]:
    bad = ~torch.isfinite(logprobs).all(1)
    if values is not None:
        bad |= ~torch.isfinite(values).all(1)
    return part.episode[bad].tolist()

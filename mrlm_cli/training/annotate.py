"""Old and reference log-probs and values, before the first update of an iteration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from mrlm_cli.algorithms.base import Needs
from mrlm_cli.metrics import Sums
from mrlm_cli.policy.model import Policy
from mrlm_cli.records import Batch
from mrlm_cli.training.collate import micro_batches

# Where old log-probs come from: a forward before the update, what the sampler said, or the update's own forward. The
# last is for a single optimizer step an iteration: nothing has moved by then, so its log-probs are the old ones.
OldFrom = Literal["scoring", "sampler", "update"]


class Gap:
    """|sampler's log-prob − trainer's| of chosen tokens: the price of decoding and scoring being two programs.

    In float32 it must be rounding. `sampler_gap` is its mean, `sampler_gap_max` the largest; both keep a NaN.
    """

    def __init__(self) -> None:
        self._sums = Sums()
        self._largest = torch.zeros(())

    @property
    def finite(self) -> bool:
        """Whether every log-prob that was added is a number."""
        return bool(torch.isfinite(self._largest))

    @torch.no_grad()
    def add(self, batch: Batch, logprobs: torch.Tensor) -> None:
        """Rows with the log-probs [B,T] that a forward in training gave them."""
        seen = batch.mask & batch.score
        gap = torch.where(seen, (batch.logprobs - logprobs).abs(), 0.0)
        self._sums.add("sampler_gap", gap.sum(), seen.sum())
        self._largest = torch.maximum(self._largest.to(gap), gap.max())  # Python's max would drop a NaN

    def sums(self) -> Sums:
        """What was added so far, as metrics."""
        found = Sums()
        found.update(self._sums)
        found.add("sampler_gap_max", self._largest)
        return found


@torch.no_grad()
def annotate(
    batch: Batch,
    policy: Policy,
    reference: Policy | None,
    needs: Needs,
    *,
    temperature: float,
    budget: int,
    phase: Callable[[str, int, int], None],
    old_from: OldFrom = "scoring",
) -> tuple[Batch, Sums]:
    """`batch` with `old_logprobs`, `values`, `final_values` and `ref_logprobs` where they are needed and not there.

    Unless the old ones come from scoring, the gap is left to the update to measure. Without values that saves the
    policy's whole pass, and with a separate critic too; values on the policy's own trunk need that trunk, so that only
    its head and the log-softmax are saved. `old_logprobs` that come from the update are still absent here.
    """
    asks = needs.reference and batch.ref_logprobs is None
    scores = needs.old and (needs.values or old_from == "scoring")
    if needs.old and old_from == "sampler":
        batch = batch.replace(old_logprobs=batch.logprobs)
    if not (scores or asks):
        return batch, Sums()
    shape = batch.mask.shape
    old = torch.zeros(shape, device=batch.tokens.device)
    values = torch.zeros_like(old) if needs.values and scores else None
    final = torch.zeros(shape[0], device=old.device) if values is not None else None
    ref = torch.zeros_like(old) if asks else batch.ref_logprobs
    cuts = micro_batches(batch, budget)
    with policy.steady():
        for number, rows in enumerate(cuts):
            phase("scoring", number, len(cuts))
            part = batch.rows(rows)
            width = part.tokens.shape[1]
            if scores:
                out = policy(
                    part.tokens,
                    part.lengths,
                    part.score,
                    temperature=temperature,
                    entropy=False,
                    logprobs=old_from == "scoring",
                    values=needs.values,
                )
                old[rows, :width] = out.logprobs
                if values is not None and final is not None:
                    values[rows, :width] = out.values
                    final[rows] = out.final_values
            if asks and ref is not None and reference is not None:
                out = reference(
                    part.tokens, part.lengths, part.score, temperature=temperature, entropy=False, values=False
                )
                ref[rows, :width] = out.logprobs
    batch = batch.replace(values=values, final_values=final, ref_logprobs=ref)
    if old_from != "scoring" or not needs.old:
        return batch, Sums()
    gap = Gap()
    gap.add(batch, old)
    return batch.replace(old_logprobs=old), gap.sums()


def unsound_rows(batch: Batch) -> list[int]:
    """Rows whose rewards, log-probs or values are not finite."""
    sound = torch.ones(batch.mask.shape[0], dtype=torch.bool, device=batch.mask.device)
    for field in (batch.rewards, batch.logprobs, batch.old_logprobs, batch.ref_logprobs, batch.values):
        if field is not None:
            sound &= torch.isfinite(field).all(1)
    if batch.final_values is not None:
        sound &= torch.isfinite(batch.final_values)
    return torch.nonzero(~sound).flatten().tolist()

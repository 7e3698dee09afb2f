"""Old and reference log-probs and values, before the first update of an iteration."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mrlm_cli.algorithms.base import Needs
from mrlm_cli.metrics import Sums
from mrlm_cli.policy.model import Policy
from mrlm_cli.records import Batch
from mrlm_cli.training.collate import micro_batches


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
) -> tuple[Batch, Sums]:
    """`batch` with `old_logprobs`, `values`, `final_values` and `ref_logprobs` where they are needed and not there.

    `sampler_gap` compares the sampler's log-probs with these: it is the price of decoding and scoring being two
    programs, and in float32 it must be rounding.
    """
    asks = needs.reference and batch.ref_logprobs is None
    if not (needs.old or asks):
        return batch, Sums()
    shape = batch.mask.shape
    old = torch.zeros(shape, device=batch.tokens.device)
    values = torch.zeros_like(old) if needs.values and needs.old else None
    final = torch.zeros(shape[0], device=old.device) if values is not None else None
    ref = torch.zeros_like(old) if asks else batch.ref_logprobs
    cuts = micro_batches(batch, budget)
    for number, rows in enumerate(cuts):
        phase("scoring", number, len(cuts))
        part = batch.rows(rows)
        width = part.tokens.shape[1]
        if needs.old:
            out = policy(
                part.tokens, part.lengths, part.score, temperature=temperature, entropy=False, values=needs.values
            )
            old[rows, :width] = out.logprobs
            if values is not None and final is not None:
                values[rows, :width] = out.values
                final[rows] = out.final_values
        if asks and ref is not None and reference is not None:
            out = reference(part.tokens, part.lengths, part.score, temperature=temperature, entropy=False, values=False)
            ref[rows, :width] = out.logprobs
    if not needs.old:
        return batch.replace(ref_logprobs=ref), Sums()
    gap = torch.where(batch.mask, (batch.logprobs - old).abs(), 0.0)
    sums = Sums()
    sums.add("sampler_gap", gap.sum(), batch.mask.sum())
    sums.add("sampler_gap_max", gap.max())
    return batch.replace(old_logprobs=old, values=values, final_values=final, ref_logprobs=ref), sums


def unsound_rows(batch: Batch) -> list[int]:
    """Rows whose rewards, log-probs or values are not finite."""
    sound = torch.ones(batch.mask.shape[0], dtype=torch.bool, device=batch.mask.device)
    for field in (batch.rewards, batch.logprobs, batch.old_logprobs, batch.ref_logprobs, batch.values):
        if field is not None:
            sound &= torch.isfinite(field).all(1)
    if batch.final_values is not None:
        sound &= torch.isfinite(batch.final_values)
    return torch.nonzero(~sound).flatten().tolist()

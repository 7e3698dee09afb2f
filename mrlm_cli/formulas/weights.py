"""How tokens are aggregated into one loss: weights [B,T] and mass [B], so that loss = Σ weights · loss / Σ mass.

Both sums run over all micro-batches of an optimizer step, so the result depends on no way of cutting it. A row that is
not included, or has no chosen token, has zero weight and zero mass. Types: mask bool [B,T], included bool [B]; results
are in `dtype`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mrlm_cli.formulas.losses import LOG_RATIO_LIMIT


def token(mask: Tensor, included: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Every chosen token counts alike: weights = mask, mass = chosen tokens."""
    assert (mask.ndim, included.ndim) == (2, 1)
    weights = (mask & included[:, None]).to(dtype)
    return weights, weights.sum(1)


def sequence(mask: Tensor, included: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Every episode counts alike: weights = mask / chosen tokens, mass = 1."""
    weights, count = token(mask, included, dtype)
    return weights / count.clamp(min=1)[:, None], (count > 0).to(dtype)


def constant(mask: Tensor, included: Tensor, dtype: torch.dtype, length: int) -> tuple[Tensor, Tensor]:
    """Every episode is divided by the same length: weights = mask, mass = length.

    Liu et al. 2025, "Understanding R1-Zero-Like Training", Section 3.2: no bias towards long or short episodes.
    """
    weights, count = token(mask, included, dtype)
    return weights, (count > 0).to(dtype) * length


def importance(old_logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, sequence: bool) -> Tensor:
    """π_old / π_sampler, without gradient: corrects for a sampler that was not quite the policy. 1 where not chosen.

    With `sequence`, the product over the row's chosen tokens at each of them; a row's log-ratio is clamped to ±20.
    [B,T] each, mask bool -> [B,T]. Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training" (token, truncated); Liu et al. 2025, "When Speed Kills Stability" (sequence, masked).
    """
    assert old_logprobs.ndim == sampler_logprobs.ndim == mask.ndim == 2
    log_ratio = (old_logprobs - sampler_logprobs).detach().masked_fill(~mask, 0)
    if sequence:
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(mask).masked_fill(~mask, 0)
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def bounded(weights: Tensor, low: float, high: float, mask: bool) -> tuple[Tensor, Tensor]:
    """Weights outside [low, high] moved to the bound, or to 0 with `mask`; and where they are.  [B,T] -> two [B,T]."""
    assert weights.ndim == 2
    outside = (weights < low) | (weights > high)
    return (weights.masked_fill(outside, 0) if mask else weights.clamp(low, high)), outside

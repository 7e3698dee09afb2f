"""How tokens are aggregated into one loss: weights [B,T] and mass [B], so that loss = Σ weights · loss / Σ mass.

Both sums run over all micro-batches of an optimizer step, so the result depends on no way of cutting it. A row that is
not included, or has no chosen token, has zero weight and zero mass. Types: mask bool [B,T], included bool [B]; results
are in `dtype`.
"""

from __future__ import annotations

import torch
from torch import Tensor


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


def importance(old_logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """min(cap, π_old / π_sampler), without gradient: corrects for a sampler that was not quite the policy.

    [B,T] each -> [B,T]. Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training".
    """
    assert old_logprobs.ndim == sampler_logprobs.ndim == 2
    return (old_logprobs - sampler_logprobs).detach().exp().clamp(max=cap)

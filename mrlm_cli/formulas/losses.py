"""Per-token policy and value losses and what is measured beside them. All arrays are [B,T]; nothing is reduced here.

A masked position must hold finite numbers before it comes here: 0 · NaN is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0  # e^20 is far outside any clip range and far inside fp32: the clamp only stops overflow


def log_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """log ρ = log π − log π_old, clamped to ±20.  [B,T] each -> [B,T]."""
    assert logprobs.ndim == old_logprobs.ndim == 2
    return (logprobs - old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, low: float, high: float, dual_clip: float | None = None
) -> Tensor:
    """Per-token max(−Aρ, −A·clip(ρ, 1−low, 1+high)); where A < 0 at most −A·dual_clip.  [B,T] each -> [B,T]."""
    assert logprobs.ndim == old_logprobs.ndim == advantages.ndim == 2
    ratio = log_ratio(logprobs, old_logprobs).exp()
    # Schulman et al. 2017, "Proximal Policy Optimization Algorithms", Eq. 7.
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))
    if dual_clip is not None:
        # Ye et al. 2020, "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning", Eq. 5.
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    return loss


def clipped(logprobs: Tensor, old_logprobs: Tensor, low: float, high: float) -> Tensor:
    """Where the ratio lies outside [1−low, 1+high].  [B,T] each -> bool [B,T]."""
    assert logprobs.ndim == old_logprobs.ndim == 2
    ratio = log_ratio(logprobs, old_logprobs).exp()
    return (ratio < 1 - low) | (ratio > 1 + high)


def approx_kl(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Per-token estimate (ρ − 1) − log ρ ≥ 0 of KL(π_old ‖ π) on tokens of π_old.  [B,T] each -> [B,T]."""
    assert logprobs.ndim == old_logprobs.ndim == 2
    difference = log_ratio(logprobs, old_logprobs)
    # Schulman 2020, "Approximating KL Divergence", k3.
    return torch.expm1(difference) - difference


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """½ max((V−R)², (V_old + clip(V − V_old, ±clip) − R)²), or ½ (V−R)² without clip.  [B,T] each -> [B,T]."""
    assert values.ndim == old_values.ndim == returns.ndim == 2
    squared = (values - returns).square()
    if clip is not None:
        # Engstrom et al. 2020, "Implementation Matters in Deep Policy Gradients", Eq. 3 (as in OpenAI's code: max).
        near = old_values + (values - old_values).clamp(-clip, clip)
        squared = torch.maximum(squared, (near - returns).square())
    return 0.5 * squared


def sequence_log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, mean: bool) -> Tensor:
    """Σ_t log ρ_t over the row's chosen tokens, or its mean, at each of them; 0 elsewhere.  [B,T] each -> [B,T].

    The mean is the length-normalised ratio of Zheng et al. 2025, "Group Sequence Policy Optimization", Eq. 7; the sum
    is the ratio of whole episodes.
    """
    assert logprobs.ndim == old_logprobs.ndim == mask.ndim == 2
    total = (logprobs - old_logprobs).masked_fill(~mask, 0).sum(1, keepdim=True)
    if mean:
        total = total / mask.sum(1, keepdim=True).clamp(min=1)
    return total.expand_as(mask).masked_fill(~mask, 0)


def cispo(logprobs: Tensor, log_ratios: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """−sg(clip(ρ, 1−low, 1+high))·A·log π: the ratio is a bounded weight, every token keeps its gradient.

    [B,T] each -> [B,T]. MiniMax 2025, "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention",
    Eq. 4 and 5; with low = 1 there is no lower bound, as in their experiments.
    """
    assert logprobs.ndim == log_ratios.ndim == advantages.ndim == 2
    ratio = log_ratios.detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    return -ratio.clamp(1 - low, 1 + high) * advantages * logprobs


def importance_weighted(log_ratios: Tensor, advantages: Tensor) -> Tensor:
    """−Aρ, unclipped: REINFORCE on samples of the old policy.  [B,T] each -> [B,T]."""
    assert log_ratios.ndim == advantages.ndim == 2
    return -advantages * log_ratios.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()

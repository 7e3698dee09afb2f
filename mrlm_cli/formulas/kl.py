"""Per-token estimates of KL(π ‖ π_ref) on tokens drawn from π. All arrays are [B,T]; k1 = log π − log π_ref.

Source of all: Schulman 2020, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html. As a *loss*, k1 has
no expected gradient (E[∇ log π] = 0), so that it serves as reward only; the expected gradient of k2 is that of
KL(π ‖ π_ref), and that of k3 is that of the reversed KL(π_ref ‖ π).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mrlm_cli.formulas.losses import LOG_RATIO_LIMIT


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log π − log π_ref: unbiased, of either sign.  [B,T] each -> [B,T], nats."""
    assert logprobs.ndim == ref_logprobs.ndim == 2
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k1² / 2: biased, of low variance.  [B,T] each -> [B,T], nats."""
    return 0.5 * k1(logprobs, ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """e^(−k1) − 1 + k1: unbiased, never negative; k1 is clamped to ±20 against overflow.  [B,T] each -> [B,T], nats."""
    difference = k1(logprobs, ref_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(-difference) + difference


def k3_plus(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The value of k3 with the gradient of k2.  [B,T] each -> [B,T], nats."""
    gradient = k2(logprobs, ref_logprobs)
    return gradient + (k3(logprobs, ref_logprobs) - gradient).detach()

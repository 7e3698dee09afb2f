"""What compares the episodes of a task with each other. Suffixes: B rows (episodes).

score    1 0 0 | 1 1 | 1        group   0 0 0 | 1 1 | 2
mean     ⅓ ⅓ ⅓ | 1 1 | 1        a row that is not included belongs to no group and counts in none

score, x [B] float; group int64 [B], equal where rows belong together; included bool [B]. Results are float64 [B], 0
where not included.
"""

from __future__ import annotations

import torch
from torch import Tensor


def size(group: Tensor, included: Tensor) -> Tensor:
    """Included rows of each row's group."""
    return _total(torch.ones_like(group, dtype=torch.float64), group, included)


def mean(x: Tensor, group: Tensor, included: Tensor) -> Tensor:
    """Mean over each row's group."""
    return _total(x, group, included) / size(group, included).clamp(min=1)


def leave_one_out(x: Tensor, group: Tensor, included: Tensor) -> Tensor:
    """Mean over the *other* rows of each row's group; a row that is alone has its own x.

    Ahmadian et al. 2024, "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in
    LLMs", the RLOO estimator (Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!").
    """
    number = size(group, included)
    others = (_total(x, group, included) - x.double()) / (number - 1).clamp(min=1)
    return torch.where(number > 1, others, x.double()).masked_fill(~included, 0)


def std(x: Tensor, group: Tensor, included: Tensor) -> Tensor:
    """Standard deviation over each row's group with Bessel's correction; 0 for a row that is alone."""
    deviation = x.double() - mean(x, group, included)
    return (_total(deviation.square(), group, included) / (size(group, included) - 1).clamp(min=1)).sqrt()


def overlong(length: Tensor, limit: int, buffer: int) -> Tensor:
    """Penalty of long episodes: 0 up to limit − buffer tokens, rising linearly to 1 at the limit.  int64 [B] -> [B].

    Yu et al. 2025, "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", Eq. 13, with its sign turned.
    """
    assert length.ndim == 1
    return ((length.double() - (limit - buffer)) / buffer).clamp(0, 1)


def _total(x: Tensor, group: Tensor, included: Tensor) -> Tensor:
    assert x.ndim == group.ndim == included.ndim == 1
    _, place = torch.unique(group, return_inverse=True)
    sums = torch.zeros(len(group), dtype=torch.float64, device=x.device)
    sums = sums.index_add(0, place, x.double().masked_fill(~included, 0))
    return sums[place].masked_fill(~included, 0)

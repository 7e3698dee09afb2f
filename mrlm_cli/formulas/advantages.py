"""Advantages and the masked statistics around them. Suffixes: B rows (episodes), T tokens, K chosen tokens of a row.

tokens   P P P a b E E c d      P prompt, E environment, a b c d chosen
mask     F F F T T F F T T      GAE runs a -> b -> c -> d -> bootstrap value: environment tokens are passed over
"""

from __future__ import annotations

import torch
from torch import Tensor

DEGENERATE_STD = 1e-6  # below it a spread is rounding noise, and dividing by it would make noise the signal


def gae(rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Generalised advantage estimates over chosen tokens.

    δ_k = r_k + γ V_{k+1} − V_k and A_k = δ_k + γλ A_{k+1}, where k+1 is the next *chosen* token of the row and, after
    the last one, V is `bootstrap` and A is 0. A reward between two chosen tokens does not exist: rewards lie on chosen
    tokens. rewards, values [B,T], mask bool [B,T], bootstrap [B] -> [B,T], zero where not chosen.
    """
    assert (rewards.ndim, values.ndim, mask.ndim, bootstrap.ndim) == (2, 2, 2, 1)
    count_B = mask.sum(1)
    longest = int(count_B.max()) if mask.numel() else 0
    index_BK = torch.argsort(~mask, dim=1, stable=True)[:, :longest]  # chosen tokens first, in order
    real_BK = torch.arange(longest, device=mask.device) < count_B[:, None]
    rewards_BK = rewards.gather(1, index_BK)
    values_BK = values.gather(1, index_BK)
    last_BK = torch.arange(longest, device=mask.device) == count_B[:, None] - 1
    following_BK = torch.cat((values_BK[:, 1:], values_BK.new_zeros(len(mask), 1)), 1)[:, :longest]
    following_BK = torch.where(last_BK, bootstrap[:, None], following_BK)
    # Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation", Eq. 16.
    delta_BK = (rewards_BK + gamma * following_BK - values_BK).masked_fill(~real_BK, 0)
    advantages_BK = torch.zeros_like(delta_BK)
    running_B = delta_BK.new_zeros(len(mask))
    for k in range(longest - 1, -1, -1):
        running_B = delta_BK[:, k] + gamma * gae_lambda * running_B
        advantages_BK[:, k] = running_B
    return torch.zeros_like(rewards).scatter(1, index_BK, advantages_BK)


def reward_to_go(rewards: Tensor, mask: Tensor) -> Tensor:
    """Σ of the rewards from each chosen token on, undiscounted; 0 where not chosen.  [B,T] each -> [B,T]."""
    assert rewards.ndim == mask.ndim == 2
    return rewards.masked_fill(~mask, 0).flip(1).cumsum(1).flip(1).masked_fill(~mask, 0)


def last_chosen(mask: Tensor) -> Tensor:
    """bool [B,T] -> bool [B,T]: True at the last chosen token of each row that has one."""
    assert mask.ndim == 2
    return mask & (mask.flip(1).cumsum(1).flip(1) == 1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask, in float64; NaN if there is nothing. [B,T] each -> []."""
    assert x.ndim == mask.ndim
    return x.double().masked_fill(~mask, 0).sum() / mask.sum()


def masked_std(x: Tensor, mask: Tensor) -> Tensor:
    """Standard deviation of x where mask with Bessel's correction, in float64; 0 for fewer than two. -> []."""
    assert x.ndim == mask.ndim
    deviation = (x.double() - masked_mean(x, mask)).masked_fill(~mask, 0)
    return (deviation.square().sum() / (mask.sum() - 1).clamp(min=1)).sqrt()


def whiten(
    x: Tensor, mask: Tensor, keep_mean: bool = False, kind: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(x − mean) / std over the masked entries, plus the mean again with `keep_mean`; with `kind`, within each kind.

    x [B,T], mask bool [B,T], kind int64 [B] -> whitened [B,T] (zero where not masked), std [] of all before, centred
    bool []: True if a std was below 1e-6, in which case only the mean is subtracted (and added again with `keep_mean`).
    """
    assert x.ndim == mask.ndim == 2
    if kind is not None and mask.any():
        kinds = kind[mask.any(1)].unique()
        parts = [whiten(x, mask & (kind == each)[:, None], keep_mean) for each in kinds]
        whole = torch.stack([part for part, _, _ in parts]).sum(0)  # each is zero outside its own rows
        return whole, masked_std(x, mask), torch.stack([centred for _, _, centred in parts]).any()
    mean, std = masked_mean(x, mask), masked_std(x, mask)
    centred = std < DEGENERATE_STD
    # Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", the code's whiten(shift_mean).
    whitened = (x.double() - mean) / torch.where(centred, torch.ones_like(std), std)
    if keep_mean:
        whitened = whitened + mean
    return whitened.to(x.dtype).masked_fill(~mask, 0), std, centred


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 − var(R − V) / var(R) over the masked entries; NaN if the returns do not vary. [B,T] each -> []."""
    assert values.ndim == returns.ndim == mask.ndim == 2
    spread = masked_std(returns, mask)
    share = 1 - (masked_std(returns.double() - values.double(), mask) / spread).square()
    return torch.where(spread < DEGENERATE_STD, torch.full_like(share, torch.nan), share)

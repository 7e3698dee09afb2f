"""Losses over preference pairs. Arrays are [P], one number a pair; nothing is reduced here.

`margin` is h = (log π(y_w) − log π_ref(y_w)) − (log π(y_l) − log π_ref(y_l)), with y_w the preferred and y_l the other
answer: how much more the policy has come to prefer the right one than the reference did.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid, relu


def sigmoid(margin: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """−(1 − ε) log σ(βh) − ε log σ(−βh).  [P] -> [P].

    Rafailov et al. 2023, "Direct Preference Optimization", Eq. 7; with ε the chance that a pair's sides are swapped,
    Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO".
    """
    assert margin.ndim == 1
    return -(1 - label_smoothing) * logsigmoid(beta * margin) - label_smoothing * logsigmoid(-beta * margin)


def ipo(margin: Tensor, beta: float) -> Tensor:
    """(h − 1/(2β))².  [P] -> [P].

    Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences", Eq. 17, τ = β.
    """
    assert margin.ndim == 1
    return (margin - 1 / (2 * beta)).square()


def hinge(margin: Tensor, beta: float) -> Tensor:
    """max(0, 1 − βh).  [P] -> [P].  Zhao et al. 2023, "SLiC-HF", on the log-ratios of DPO with a margin of 1/β."""
    assert margin.ndim == 1
    return relu(1 - beta * margin)


def bradley_terry(preferred: Tensor, other: Tensor, centre: float = 0.0) -> Tensor:
    """−log σ(r_w − r_l) + centre · (r_w + r_l)².  [P] each -> [P].

    Ouyang et al. 2022, "Training language models to follow instructions with human feedback", Eq. 1; the second term
    fixes the offset that pairs leave open, Eisenstein et al. 2023, "Helping or Herding?", Section 2.
    """
    assert preferred.ndim == other.ndim == 1
    return -logsigmoid(preferred - other) + centre * (preferred + other).square()

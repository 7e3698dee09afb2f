"""The body of a language model: tokens in, the last hidden state out; shared by the policy and a separate critic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def run_trunk(trunk: nn.Module, tokens: Tensor) -> Tensor:
    """tokens [B,T] -> hidden state after the last norm [B,T,H].

    Rows are right-padded and attention is causal, so real tokens never see padding: no mask is passed, positions are
    0..T-1. transformers checkpoints activations only in train mode, and refuses its key-value cache there; the mode
    is therefore set for the length of this call. Dropout is zero in both modes (see `load`).
    """
    checkpointing = torch.is_grad_enabled() and any(
        getattr(module, "gradient_checkpointing", False) for module in trunk.modules()
    )
    training = trunk.training
    if checkpointing and not training:
        trunk.train()
    try:
        hidden: Tensor = trunk(input_ids=tokens, use_cache=False).last_hidden_state
    finally:
        if checkpointing and not training:
            trunk.eval()
    return hidden


def checkpoint_activations(model: Any) -> None:
    """Recompute the layers of a transformers model in the backward pass, through transformers' own switch."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:  # its name in older releases
        model.gradient_checkpointing_enable({"use_reentrant": False})


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x` unchanged; its gradient times `factor`. A factor of 0 cuts the graph."""
    if factor == 1:
        return x
    if factor == 0:
        return x.detach()
    return _ScaleGradient.apply(x, factor)  # type: ignore[no-any-return, no-untyped-call, unused-ignore]


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None

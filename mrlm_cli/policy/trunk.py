"""The body of a language model: tokens in, the last hidden state out; shared by the policy and a separate critic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mrlm_cli.kernels.llama import Trunk
from mrlm_cli.kernels.packing import pack


@dataclass(frozen=True, slots=True)
class States:
    """Hidden states of B rows, stored once for each distinct prefix."""

    hidden: Tensor  # [N,H]
    node: Tensor  # int64 [B,T]: which of them belongs to each place; N, an error, where none was asked for

    def at(self, row: Tensor, column: Tensor) -> Tensor:
        """row, column int64 [n] -> the states after reading tokens[row, : column + 1], [n,H]."""
        return self.hidden[self.node[row, column]]


def run_trunk(trunk: nn.Module, tokens: Tensor, lengths: Tensor, precision: str, wanted: Tensor) -> States:
    """tokens [B,T] right-padded, lengths [B] -> the states after the last norm, at places that are `wanted` bool [B,T].

    Models of Llama shape run packed: no padding, beginnings that rows share once, and what is not wanted goes no
    further than to the keys and values of the last layer. The others run as transformers has them: attention is
    causal, so real tokens never see padding, no mask is passed, and positions are 0..T-1.
    """
    checkpointing = torch.is_grad_enabled() and any(
        getattr(module, "gradient_checkpointing", False) for module in trunk.modules()
    )
    packed = Trunk.of(trunk)
    bf16 = precision == "bfloat16"
    if packed is not None:
        packing = pack(tokens, lengths)
        dtype = torch.bfloat16 if bf16 else None
        nodes = packing.node[wanted[:, : packing.rows[1]]].unique()
        if len(nodes) in (0, len(packing.owner)):
            return States(packed(packing, dtype, checkpointing), packing.node)
        places = torch.full_like(packing.owner, len(nodes)).index_copy_(
            0, nodes, torch.arange(len(nodes), device=nodes.device)
        )
        return States(packed(packing, dtype, checkpointing, nodes), places[packing.node])
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
        hidden = _as_transformers(trunk, tokens, checkpointing)
    return States(hidden.flatten(0, 1), torch.arange(tokens.numel(), device=tokens.device).view(tokens.shape))


def _as_transformers(trunk: nn.Module, tokens: Tensor, checkpointing: bool) -> Tensor:
    """tokens [B,T] -> [B,T,H].

    transformers checkpoints activations only in train mode, and refuses its key-value cache there; the mode is
    therefore set for the length of this call. Dropout is zero in both modes (see `load`).
    """
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

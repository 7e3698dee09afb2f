"""The differentiable pieces of a Llama-shaped layer, each with its own backward pass.

N packed positions, H width, c the compute type (bfloat16 or the type of the residual stream). The residual stream,
norms, rotary angles and attention are in the residual stream's type (float32, or float64 in tests); only the products
with weight matrices, and what lies between two of them in the MLP, are in c.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mrlm_cli.kernels.between import rms_norm, rms_norm_backward, swiglu, swiglu_backward
from mrlm_cli.kernels.packing import Packing
from mrlm_cli.kernels.parameters import Factor
from mrlm_cli.kernels.products import input_gradient, linear


class Linear(torch.autograd.Function):
    """x [N,I] in c times a factor [O,I] in c, whose parts follow it -> [N,O] in c."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Factor, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(x, factor.whole)
        ctx.shares = factor.shares
        return linear(x, factor.whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_x = input_gradient(gradient, weight) if ctx.needs_input_grad[0] else None
        return of_x, None, *ctx.shares.gradients(gradient, x, ctx.needs_input_grad[2:])


class NormLinear(torch.autograd.Function):
    """x [N,H] of the residual stream -> (y factorᵀ + bias [N,O], y [N,H]) for y = rmsnorm(x) · gain, both in c.

    The factor [O,H] is in c, and its parts follow it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, bias: Tensor | None, eps: float, factor: Factor, *parts: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        weight = factor.whole
        normed, scale = rms_norm(x, gain, eps, weight.dtype)
        ctx.save_for_backward(x, gain, weight, scale)  # y is cheaper to make again than to keep
        ctx.shares = factor.shares
        return linear(normed, weight, bias), normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, besides: Tensor | None) -> tuple[Tensor | None, ...]:
        x, gain, weight, scale = ctx.saved_tensors
        gradient = weight.new_zeros(len(x), len(weight)) if gradient is None else gradient.contiguous()
        needed = ctx.needs_input_grad[5:]
        of_x, of_gain, normed = rms_norm_backward(
            input_gradient(gradient, weight), besides, x, gain, scale, again=any(needed)
        )
        of_bias = gradient.sum(0) if ctx.needs_input_grad[2] else None
        found = [None] * len(needed) if normed is None else ctx.shares.gradients(gradient, normed, needed)
        return of_x, of_gain, of_bias, None, None, *found


class SwiGLULinear(torch.autograd.Function):
    """gate and up side by side [N,2I] in c, a factor [O,I] in c and its parts -> (y factorᵀ [N,O], y [N,I]).

    y = silu(gate) · up. Kept for the backward pass: gate and up alone.
    """

    @staticmethod
    def forward(ctx: Any, both: Tensor, factor: Factor, *parts: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(both, factor.whole)
        ctx.shares = factor.shares
        gated = swiglu(both)
        return linear(gated, factor.whole), gated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, besides: Tensor | None) -> tuple[Tensor | None, ...]:
        both, weight = ctx.saved_tensors
        gradient = weight.new_zeros(len(both), len(weight)) if gradient is None else gradient.contiguous()
        needed = ctx.needs_input_grad[2:]
        of_both, gated = swiglu_backward(input_gradient(gradient, weight), besides, both, again=any(needed))
        found = [None] * len(needed) if gated is None else ctx.shares.gradients(gradient, gated, needed)
        return of_both, None, *found


class Spread(torch.autograd.Function):
    """Packed positions x [N,D] -> rows [B*T,D]; a gradient comes back summed over the rows that share a position."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return spread(x, packing)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gather(gradient, ctx.packing), None


def spread(x: Tensor, packing: Packing) -> Tensor:
    """x [N,D] -> [B*T,D]; places behind the end of a row repeat position 0."""
    return x if packing.plain else x.index_select(0, packing.node.reshape(-1))


def gather(rows: Tensor, packing: Packing) -> Tensor:
    """rows [B*T,D], zero behind the end of each row -> sums over the rows that share a position [N,D]."""
    if packing.plain:
        return rows
    # The sums of an embedding's backward pass: in a fixed order, whatever the number of threads.
    return torch.ops.aten.embedding_dense_backward(rows, packing.node.reshape(-1), len(packing.owner), -1, False)

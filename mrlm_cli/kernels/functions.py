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
from mrlm_cli.kernels.products import input_gradient, linear, weight_gradient


class Linear(torch.autograd.Function):
    """x [N,I] in c, weight [O,I] in c -> [N,O] in c."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        return input_gradient(gradient, weight), weight_gradient(gradient, x) if ctx.needs_input_grad[1] else None


class NormLinear(torch.autograd.Function):
    """x [N,H] of the residual stream -> (y weightᵀ + bias [N,O], y [N,H]) for y = rmsnorm(x) · gain, both in c."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        normed, scale = rms_norm(x, gain, eps, weight.dtype)
        ctx.save_for_backward(x, gain, weight, scale)  # y is cheaper to make again than to keep
        return linear(normed, weight, bias), normed

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: Tensor | None, besides: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, None]:
        x, gain, weight, scale = ctx.saved_tensors
        gradient = weight.new_zeros(len(x), len(weight)) if gradient is None else gradient.contiguous()
        of_x, of_gain, normed = rms_norm_backward(
            input_gradient(gradient, weight), besides, x, gain, scale, again=ctx.needs_input_grad[2]
        )
        return (
            of_x,
            of_gain,
            None if normed is None else weight_gradient(gradient, normed),
            gradient.sum(0) if ctx.needs_input_grad[3] else None,
            None,
        )


class SwiGLULinear(torch.autograd.Function):
    """gate and up side by side [N,2I], weight [O,I], both in c -> (y weightᵀ [N,O], y [N,I]) for y = silu(gate) · up.

    Kept for the backward pass: gate and up alone.
    """

    @staticmethod
    def forward(ctx: Any, both: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(both, weight)
        gated = swiglu(both)
        return linear(gated, weight), gated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, besides: Tensor | None) -> tuple[Tensor, Tensor | None]:
        both, weight = ctx.saved_tensors
        gradient = weight.new_zeros(len(both), len(weight)) if gradient is None else gradient.contiguous()
        of_both, gated = swiglu_backward(input_gradient(gradient, weight), besides, both, again=ctx.needs_input_grad[1])
        return of_both, None if gated is None else weight_gradient(gradient, gated)


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

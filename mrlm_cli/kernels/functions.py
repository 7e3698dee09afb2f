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
    """x [N,H] of the residual stream -> (y weightᵀ + bias [N,O], y [N,H]) for y = rmsnorm(x) · gain, both in c.

    RMSNorm after Zhang & Sennrich 2019, with the mean square in x's own type: y = x / sqrt(mean(x²) + eps) · gain, and
    dx = r · (dn − n · mean(dn · n)) for n = x · r, r the reciprocal root.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        normed = (x * scale).mul_(gain).to(weight.dtype)
        ctx.save_for_backward(x, gain, weight, scale)  # y is cheaper to make again than to keep
        return linear(normed, weight, bias), normed

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: Tensor | None, besides: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, None]:
        x, gain, weight, scale = ctx.saved_tensors
        gradient = weight.new_zeros(len(x), len(weight)) if gradient is None else gradient.contiguous()
        of_normed = input_gradient(gradient, weight).to(x.dtype)
        if besides is not None:  # from what else was made of y
            of_normed = of_normed + besides
        unit = x * scale
        of_weight = None
        if ctx.needs_input_grad[2]:
            of_weight = weight_gradient(gradient, (unit * gain).to(weight.dtype))
        of_gain = (of_normed * unit).sum(0)
        of_unit = of_normed.mul_(gain)
        of_x = of_unit.sub_(unit.mul_((of_unit * unit).mean(-1, keepdim=True))).mul_(scale)
        return (
            of_x,
            of_gain,
            of_weight,
            gradient.sum(0) if ctx.needs_input_grad[3] else None,
            None,
        )


class SwiGLULinear(torch.autograd.Function):
    """gate and up side by side [N,2I], weight [O,I], both in c -> (y weightᵀ [N,O], y [N,I]) for y = silu(gate) · up.

    FFN_SwiGLU of Shazeer 2020, "GLU Variants Improve Transformer". Kept for the backward pass: gate and up alone.
    """

    @staticmethod
    def forward(ctx: Any, both: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(both, weight)
        gate, up = both.chunk(2, dim=-1)
        gated = torch.nn.functional.silu(gate).mul_(up)
        return linear(gated, weight), gated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, besides: Tensor | None) -> tuple[Tensor, Tensor | None]:
        both, weight = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        gradient = weight.new_zeros(len(both), len(weight)) if gradient is None else gradient.contiguous()
        of_gated = input_gradient(gradient, weight)
        if besides is not None:  # from what else was made of y
            of_gated = of_gated + besides
        silu = torch.nn.functional.silu(gate)
        out = torch.empty_like(both)
        of_gate, of_up = out.chunk(2, dim=-1)
        torch.mul(of_gated, silu, out=of_up)
        of_weight = weight_gradient(gradient, silu.mul_(up)) if ctx.needs_input_grad[1] else None
        torch.ops.aten.silu_backward(of_gated.mul_(up), gate, grad_input=of_gate)
        return out, of_weight


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


class Attention(torch.autograd.Function):
    """Causal attention with every score written out: fastest for short rows.

    projected [N,(heads+2·kv_heads)·d] in c, queries, keys and values side by side; cos, sin [N,d/2]
    -> [N,heads·d] in c. Rotation, scores, softmax and the gradient of the probabilities are in the type of the angles;
    the products of probabilities (or of their gradient) with values, keys and queries are in c. Kept for the backward
    pass: queries, keys, values and the probabilities [B,heads,T,T], in c.
    """

    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        cos: Tensor,
        sin: Tensor,
        packing: Packing,
        heads: int,
        kv_heads: int,
        scaling: float,
    ) -> Tensor:
        dtype = projected.dtype
        query, key, value = _rows(projected, cos, sin, packing, heads, kv_heads)
        chances = _attention(query, key, scaling, packing).to(dtype)  # [B*kv, g*T, T]
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        ctx.save_for_backward(query, key, value, chances, cos, sin)
        ctx.packing, ctx.heads, ctx.kv_heads, ctx.scaling = packing, heads, kv_heads, scaling
        return _unhead(chances @ value, packing, heads, kv_heads).index_select(0, packing.owner)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, chances, cos, sin = ctx.saved_tensors
        packing, heads, kv_heads = ctx.packing, ctx.heads, ctx.kv_heads
        rows, longest = packing.rows
        width, dtype = key.shape[-1], key.dtype
        given = gradient
        if not packing.plain:  # a shared position is attended from once, for all rows that hold it
            given = given.new_zeros(rows * longest, heads * width).index_copy_(0, packing.owner, given)
        given = _head(given.view(rows, longest, heads, width), kv_heads)  # [B*kv, g*T, d]
        of_value = chances.transpose(1, 2) @ given
        of_scores = given.to(cos.dtype) @ value.to(cos.dtype).transpose(1, 2)
        of_scores.sub_((of_scores * chances).sum(-1, keepdim=True)).mul_(chances)
        slope = of_scores.mul_(ctx.scaling).to(dtype)
        of_query = slope @ key
        of_key = slope.transpose(1, 2) @ query
        out = cos.new_empty(rows, longest, heads + 2 * kv_heads, width)
        out[:, :, :heads].unflatten(2, (kv_heads, -1)).copy_(
            of_query.view(rows, kv_heads, -1, longest, width).permute(0, 3, 1, 2, 4)
        )
        out[:, :, heads:-kv_heads] = of_key.view(rows, kv_heads, longest, width).transpose(1, 2)
        out[:, :, -kv_heads:] = of_value.view(rows, kv_heads, longest, width).transpose(1, 2)
        of_projected = gather(out.view(rows * longest, -1), packing)
        rotate_(of_projected.view(len(cos), -1, width)[:, : heads + kv_heads], cos, -sin)
        return of_projected.to(dtype), None, None, None, None, None, None


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate x [N,heads,d] in place by the angles of cos, sin [N,d/2]: halves (a, b) -> (a·cos − b·sin, b·cos + a·sin).

    The inverse is the rotation by −sin (Su et al. 2021, in the layout of halves that transformers uses).
    """
    cos, sin = cos[:, None], sin[:, None]
    first, second = x.chunk(2, dim=-1)
    turned = first * sin
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).add_(turned)


def _rows(
    projected: Tensor, cos: Tensor, sin: Tensor, packing: Packing, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B*kv, g*T, d], keys and values [B*kv, T, d], rotated, in the type of the angles."""
    rows, longest = packing.rows
    every = heads + 2 * kv_heads
    x = projected.to(cos.dtype, copy=True).view(len(cos), every, -1)
    rotate_(x[:, : heads + kv_heads], cos, sin)
    wide = spread(x.view(len(cos), -1), packing).view(rows, longest, every, -1)
    query = _head(wide[:, :, :heads], kv_heads)
    key = wide[:, :, heads:-kv_heads].transpose(1, 2).reshape(rows * kv_heads, longest, -1)
    value = wide[:, :, -kv_heads:].transpose(1, 2).reshape(rows * kv_heads, longest, -1)
    return query, key, value


def _head(x: Tensor, kv_heads: int) -> Tensor:
    """[B,T,heads,d] -> [B*kv, g*T, d]: the g query heads that share a key head lie together."""
    rows, longest, heads, width = x.shape
    grouped = x.view(rows, longest, kv_heads, heads // kv_heads, width).permute(0, 2, 3, 1, 4)
    return grouped.reshape(rows * kv_heads, heads // kv_heads * longest, width)


def _unhead(x: Tensor, packing: Packing, heads: int, kv_heads: int) -> Tensor:
    """[B*kv, g*T, d] -> [B*T, heads*d]."""
    rows, longest = packing.rows
    return x.view(rows, kv_heads, heads // kv_heads, longest, -1).permute(0, 3, 1, 2, 4).reshape(rows * longest, -1)


def _attention(query: Tensor, key: Tensor, scaling: float, packing: Packing) -> Tensor:
    """Attention probabilities [B*kv, g*T, T]. Rows are padded behind their end only, so causality is the whole mask."""
    _, longest = packing.rows
    mask = query.new_full((longest, longest), -torch.inf).triu_(1).repeat(query.shape[1] // longest, 1)
    return torch.softmax(torch.baddbmm(mask, query, key.transpose(1, 2), alpha=scaling), dim=-1)

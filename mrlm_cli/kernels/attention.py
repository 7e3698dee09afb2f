"""Causal attention of rows that share beginnings, with every score of some queries written out.

N packed positions, B rows of at most T tokens, heads queries and kv_heads keys and values of d numbers, of which the
g = heads / kv_heads queries of one key lie together; c the compute type.

The kernels in C do all of it in float32, some queries at a time, and round to c once: what is kept for the backward
pass is the input alone, and queries that rows have in common are computed once. torch's operators write out all scores
of a micro-batch: they have rotation, scores, softmax and the gradient of the probabilities in the type of the angles,
and the products of probabilities (or of their gradient) with values, keys and queries in c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mrlm_cli.kernels import native
from mrlm_cli.kernels.functions import gather, spread
from mrlm_cli.kernels.packing import Packing


@dataclass(frozen=True, slots=True)
class Heads:
    """How many queries, and how many keys and values."""

    queries: int
    keys: int

    @property
    def every(self) -> int:
        """All that lie side by side in a projection."""
        return self.queries + 2 * self.keys


def library_for(projected: Tensor, cos: Tensor, heads: Heads) -> native.Library | None:
    """The kernels in C, if they can do this attention."""
    library, width = native.on(projected, cos), projected.shape[-1] // heads.every
    if library is None or cos.dtype != torch.float32 or width > library.widest_head or width % 2:
        return None
    return library


class FusedAttention(torch.autograd.Function):
    """projected [N,(heads+2·kv_heads)·d], queries, keys and values side by side; cos, sin [N,d/2] -> [N,heads·d], in c.

    By the kernels in C: see `library_for`.
    """

    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, cos: Tensor, sin: Tensor, packing: Packing, heads: Heads, scaling: float
    ) -> Tensor:
        library = library_for(projected, cos, heads)
        assert library is not None
        ctx.save_for_backward(projected, cos, sin)
        ctx.library, ctx.packing, ctx.heads, ctx.scaling = library, packing, heads, scaling
        rows, longest = packing.rows
        width, threads = projected.shape[-1] // heads.every, _threads(packing, heads)
        # What the kernel reads by address.
        assert sin.dtype == cos.dtype
        assert sin.shape == cos.shape == (len(projected), width // 2)
        assert packing.owner.dtype == packing.node.dtype == torch.int64
        assert len(packing.owner) == len(projected)
        out = projected.new_empty(len(projected), heads.queries * width)
        native.run(
            library.attend,
            projected,
            cos,
            sin,
            packing.node,
            packing.owner,
            out,
            cos.new_empty(threads * library.attention_scratch(longest, width, False)),
            rows,
            longest,
            heads.queries,
            heads.keys,
            width,
            scaling,
            like=projected,
            threads=threads,
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        projected, cos, sin = ctx.saved_tensors
        library, packing, heads = ctx.library, ctx.packing, ctx.heads
        rows, longest = packing.rows
        width, threads = projected.shape[-1] // heads.every, _threads(packing, heads)
        out = torch.empty_like(projected)
        native.run(
            library.attend_backward,
            projected,
            cos,
            sin,
            packing.node,
            packing.owner,
            packing.holders,
            packing.starts,
            gradient.contiguous(),
            out,
            cos.new_empty(rows * longest, 2 * heads.keys * width),
            cos.new_empty(threads * library.attention_scratch(longest, width, True)),
            len(projected),
            rows,
            longest,
            heads.queries,
            heads.keys,
            width,
            ctx.scaling,
            like=projected,
            threads=threads,
        )
        return out, None, None, None, None, None


def _threads(packing: Packing, heads: Heads) -> int:
    rows, longest = packing.rows
    return min(native.threads(rows * heads.queries * longest**2), rows * heads.keys)


class Attention(torch.autograd.Function):
    """projected [N,(heads+2·kv_heads)·d], queries, keys and values side by side; cos, sin [N,d/2] -> [N,heads·d], in c.

    By torch's operators. Kept for the backward pass: queries, keys, values and the probabilities [B,heads,T,T], in c.
    """

    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, cos: Tensor, sin: Tensor, packing: Packing, heads: Heads, scaling: float
    ) -> Tensor:
        rows, longest = packing.rows
        x = projected.to(cos.dtype, copy=True).view(len(cos), heads.every, -1)
        rotate_(x[:, : heads.queries + heads.keys], cos, sin)
        wide = spread(x.view(len(cos), -1), packing).view(rows, longest, heads.every, -1)
        parts = wide.split([heads.queries, heads.keys, heads.keys], dim=2)
        wide_query, wide_key, wide_value = (_grouped(part, heads.keys) for part in parts)
        scores = wide_query @ wide_key.transpose(1, 2)  # [B*kv, g*T, T]
        # Rows are padded behind their end only, so causality is the whole mask.
        mask = scores.new_full((longest, longest), -torch.inf).triu_(1).repeat(heads.queries // heads.keys, 1)
        query, key, value, chances = (
            each.to(projected.dtype)
            for each in (wide_query, wide_key, wide_value, torch.softmax(scores.mul_(scaling).add_(mask), dim=-1))
        )
        ctx.save_for_backward(query, key, value, chances, cos, sin)
        ctx.packing, ctx.heads, ctx.scaling = packing, heads, scaling
        attended = _ungrouped(chances @ value, packing, heads.keys)
        return attended.flatten(2).flatten(0, 1).index_select(0, packing.owner)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, chances, cos, sin = ctx.saved_tensors
        packing, heads = ctx.packing, ctx.heads
        rows, longest = packing.rows
        width = query.shape[-1]
        if not packing.plain:  # a shared position is attended from once
            gradient = gradient.new_zeros(rows * longest, heads.queries * width).index_copy_(0, packing.owner, gradient)
        given = _grouped(gradient.view(rows, longest, heads.queries, width), heads.keys)
        of_value = chances.transpose(1, 2) @ given
        of_chances = given.to(cos.dtype) @ value.to(cos.dtype).transpose(1, 2)
        of_chances.sub_((of_chances * chances).sum(-1, keepdim=True)).mul_(chances)
        slope = of_chances.mul_(ctx.scaling).to(chances.dtype)
        of_query, of_key = slope @ key, slope.transpose(1, 2) @ query
        parts = [_ungrouped(part, packing, heads.keys) for part in (of_query, of_key, of_value)]
        out = torch.cat([part.to(cos.dtype) for part in parts], dim=2)
        found = gather(out.view(rows * longest, -1), packing)
        rotate_(found.view(len(cos), -1, width)[:, : heads.queries + heads.keys], cos, -sin)
        return found.to(query.dtype), None, None, None, None, None


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate x [N,heads,d] in place by the angles of cos, sin [N,d/2]: halves (a, b) -> (a·cos − b·sin, b·cos + a·sin).

    The inverse is the rotation by −sin (Su et al. 2021, in the layout of halves that transformers uses).
    """
    cos, sin = cos[:, None], sin[:, None]
    first, second = x.chunk(2, dim=-1)
    turned = first * sin
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).add_(turned)


def _grouped(x: Tensor, keys: int) -> Tensor:
    """[B,T,heads,d] -> [B*kv, g*T, d]: the g heads that share a key lie together."""
    rows, longest, heads, width = x.shape
    together = x.unflatten(2, (keys, heads // keys)).permute(0, 2, 3, 1, 4)
    return together.reshape(rows * keys, heads // keys * longest, width)


def _ungrouped(x: Tensor, packing: Packing, keys: int) -> Tensor:
    """[B*kv, g*T, d] -> [B,T,heads,d]."""
    rows, longest = packing.rows
    return x.view(rows, keys, -1, longest, x.shape[-1]).permute(0, 3, 1, 2, 4).flatten(2, 3)

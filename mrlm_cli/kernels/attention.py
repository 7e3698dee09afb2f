"""Causal attention with every score written out: fastest for short rows.

N packed positions, B rows of at most T tokens, heads queries and kv_heads keys and values of d numbers, of which the
g = heads / kv_heads queries of one key lie together; c the compute type. Rotation, scores, softmax and the gradient of
the probabilities are in the type of the angles; the products of probabilities (or of their gradient) with values, keys
and queries are in c. What lies between the products is done by the kernels in C where they can be had, else by torch's
operators.
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


class Attention(torch.autograd.Function):
    """projected [N,(heads+2·kv_heads)·d], queries, keys and values side by side; cos, sin [N,d/2] -> [N,heads·d], in c.

    Kept for the backward pass: queries, keys, values and the probabilities [B,heads,T,T], in c.
    """

    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, cos: Tensor, sin: Tensor, packing: Packing, heads: Heads, scaling: float
    ) -> Tensor:
        dtype = projected.dtype
        query, key, value = _parted(projected, cos, sin, packing, heads)
        chances = _chances(query.wide @ key.wide.transpose(1, 2), scaling, dtype)  # [B*kv, g*T, T]
        ctx.save_for_backward(query.own, key.own, value, chances, cos, sin)
        ctx.packing, ctx.heads, ctx.scaling = packing, heads, scaling
        return _joined(chances @ value, packing, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, chances, cos, sin = ctx.saved_tensors
        packing, heads = ctx.packing, ctx.heads
        given = _given(gradient.contiguous(), packing, heads, cos.dtype)
        of_value = chances.transpose(1, 2) @ given.own
        of_chances = given.wide @ value.to(cos.dtype).transpose(1, 2)
        slope = _slope(of_chances, chances, ctx.scaling)
        of_query, of_key = slope @ key, slope.transpose(1, 2) @ query
        return _collected(of_query, of_key, of_value, cos, sin, packing, heads), None, None, None, None, None


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate x [N,heads,d] in place by the angles of cos, sin [N,d/2]: halves (a, b) -> (a·cos − b·sin, b·cos + a·sin).

    The inverse is the rotation by −sin (Su et al. 2021, in the layout of halves that transformers uses).
    """
    cos, sin = cos[:, None], sin[:, None]
    first, second = x.chunk(2, dim=-1)
    turned = first * sin
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).add_(turned)


@dataclass(frozen=True, slots=True)
class _Both:
    """The same numbers in the type of the angles and in c."""

    wide: Tensor
    own: Tensor


def _library(projected: Tensor, cos: Tensor, heads: Heads) -> native.Library | None:
    library = native.on(projected, cos)
    if library is None or cos.dtype != torch.float32 or projected.shape[-1] // heads.every > library.widest_head:
        return None
    return library


def _parted(projected: Tensor, cos: Tensor, sin: Tensor, packing: Packing, heads: Heads) -> tuple[_Both, _Both, Tensor]:
    """Queries [B*kv, g*T, d] and keys [B*kv, T, d], rotated, in both types; values [B*kv, T, d] in c."""
    rows, longest = packing.rows
    width = projected.shape[-1] // heads.every
    dtype = projected.dtype
    if library := _library(projected, cos, heads):
        wide_query = cos.new_empty(rows * heads.keys, heads.queries // heads.keys * longest, width)
        wide_key = cos.new_empty(rows * heads.keys, longest, width)
        same = dtype == cos.dtype
        query = wide_query if same else torch.empty_like(wide_query, dtype=dtype)
        key = wide_key if same else torch.empty_like(wide_key, dtype=dtype)
        value = torch.empty_like(key)
        native.run(
            library.spread_heads,
            projected,
            cos,
            sin,
            packing.node,
            wide_query,
            wide_key,
            query,
            key,
            value,
            *_shape(packing, heads, width),
            like=projected,
            threads=native.threads(wide_query.numel()),
        )
        return _Both(wide_query, query), _Both(wide_key, key), value
    x = projected.to(cos.dtype, copy=True).view(len(cos), heads.every, -1)
    rotate_(x[:, : heads.queries + heads.keys], cos, sin)
    wide = spread(x.view(len(cos), -1), packing).view(rows, longest, heads.every, -1)
    parts = wide.split([heads.queries, heads.keys, heads.keys], dim=2)
    query, key, value = (_grouped(part, heads.keys) for part in parts)
    return _Both(query, query.to(dtype)), _Both(key, key.to(dtype)), value.to(dtype)


def _chances(scores: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """Products of queries and keys [B*kv, g*T, T] -> attention probabilities in `dtype`.

    Rows are padded behind their end only, so causality is the whole mask.
    """
    longest = scores.shape[-1]
    if (library := native.on(scores)) and scores.dtype == torch.float32 and dtype in (torch.float32, torch.bfloat16):
        chances = scores if dtype == scores.dtype else torch.empty_like(scores, dtype=dtype)
        count = scores.numel()
        native.run(
            library.causal_softmax,
            scores,
            chances,
            scaling,
            count // longest,
            longest,
            like=chances,
            threads=native.threads(count),
        )
        return chances
    mask = scores.new_full((longest, longest), -torch.inf).triu_(1).repeat(scores.shape[1] // longest, 1)
    return torch.softmax(scores.mul_(scaling).add_(mask), dim=-1).to(dtype)


def _joined(attended: Tensor, packing: Packing, heads: Heads) -> Tensor:
    """[B*kv, g*T, d] -> [N, heads*d]."""
    width = attended.shape[-1]
    if library := native.on(attended):
        out = attended.new_empty(len(packing.owner), heads.queries * width)
        native.run(
            library.join_heads,
            attended,
            packing.owner,
            out,
            len(out),
            *_shape(packing, heads, width),
            like=out,
            threads=native.threads(out.numel()),
        )
        return out
    return _ungrouped(attended, packing, heads.keys).flatten(2).flatten(0, 1).index_select(0, packing.owner)


def _given(gradient: Tensor, packing: Packing, heads: Heads, wide: torch.dtype) -> _Both:
    """The gradient of `_joined`: [N, heads*d] -> [B*kv, g*T, d]; a shared position is attended from once."""
    rows, longest = packing.rows
    width = gradient.shape[-1] // heads.queries
    if (library := native.on(gradient)) and wide == torch.float32 and width <= library.widest_head:
        out = gradient.new_empty(rows * heads.keys, heads.queries // heads.keys * longest, width, dtype=torch.float32)
        own = out if gradient.dtype == wide else torch.empty_like(out, dtype=gradient.dtype)
        native.run(
            library.join_heads_backward,
            gradient,
            packing.node,
            packing.owner,
            out,
            own,
            *_shape(packing, heads, width),
            like=gradient,
            threads=native.threads(out.numel()),
        )
        return _Both(out, own)
    if not packing.plain:
        gradient = gradient.new_zeros(rows * longest, heads.queries * width).index_copy_(0, packing.owner, gradient)
    own = _grouped(gradient.view(rows, longest, heads.queries, width), heads.keys)
    return _Both(own.to(wide), own)


def _slope(of_chances: Tensor, chances: Tensor, scaling: float) -> Tensor:
    """The gradient of the scores before scaling, [B*kv, g*T, T] in c; `of_chances` may be overwritten."""
    longest = chances.shape[-1]
    if (library := native.on(of_chances, chances)) and of_chances.dtype == torch.float32:
        slope = of_chances if chances.dtype == of_chances.dtype else torch.empty_like(chances)
        count = chances.numel()
        native.run(
            library.causal_softmax_backward,
            of_chances,
            chances,
            slope,
            scaling,
            count // longest,
            longest,
            like=chances,
            threads=native.threads(count),
        )
        return slope
    of_chances.sub_((of_chances * chances).sum(-1, keepdim=True)).mul_(chances)
    return of_chances.mul_(scaling).to(chances.dtype)


def _collected(
    of_query: Tensor, of_key: Tensor, of_value: Tensor, cos: Tensor, sin: Tensor, packing: Packing, heads: Heads
) -> Tensor:
    """The gradient of `_parted`: those of queries, keys and values, summed over the rows that share a position."""
    rows, longest = packing.rows
    width, dtype = of_key.shape[-1], of_key.dtype
    if (library := native.on(of_query, cos)) and cos.dtype == torch.float32 and width <= library.widest_head:
        found = of_query.new_empty(len(cos), heads.every * width)
        native.run(
            library.spread_heads_backward,
            of_query,
            of_key,
            of_value,
            cos,
            sin,
            packing.holders,
            packing.starts,
            found,
            len(found),
            *_shape(packing, heads, width),
            like=found,
            threads=native.threads(found.numel()),
        )
        return found
    parts = [_ungrouped(part, packing, heads.keys) for part in (of_query, of_key, of_value)]
    out = torch.cat([part.to(cos.dtype) for part in parts], dim=2)
    found = gather(out.view(rows * longest, -1), packing)
    rotate_(found.view(len(cos), -1, width)[:, : heads.queries + heads.keys], cos, -sin)
    return found.to(dtype)


def _shape(packing: Packing, heads: Heads, width: int) -> tuple[int, int, int, int, int]:
    rows, longest = packing.rows
    return rows * longest, longest, heads.queries, heads.keys, width


def _grouped(x: Tensor, keys: int) -> Tensor:
    """[B,T,heads,d] -> [B*kv, g*T, d]: the g heads that share a key lie together."""
    rows, longest, heads, width = x.shape
    together = x.unflatten(2, (keys, heads // keys)).permute(0, 2, 3, 1, 4)
    return together.reshape(rows * keys, heads // keys * longest, width)


def _ungrouped(x: Tensor, packing: Packing, keys: int) -> Tensor:
    """[B*kv, g*T, d] -> [B,T,heads,d]."""
    rows, longest = packing.rows
    return x.view(rows, keys, -1, longest, x.shape[-1]).permute(0, 3, 1, 2, 4).flatten(2, 3)

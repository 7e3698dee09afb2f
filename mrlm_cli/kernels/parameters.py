"""How parameters enter a forward, and how their gradients leave it.

Autograd makes each parameter's gradient anew in every backward pass and then adds it to `.grad`; for matrices that
multiply in bfloat16 that means a copy of each in float32, and for an embedding a table of zeros. Where the caller asks
for it (`steady(adds=True)`), gradients are added to `.grad` where they arise, and autograd gets none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mrlm_cli.kernels.products import joined

# Rows of a matrix that are converted at a time, so that no copy of a whole head lies beside its gradient.
_ROWS = 2048


@dataclass(slots=True)
class _Steady:
    adds: bool
    # What `fused` made, with its parts: parts that live cannot lend their id to others.
    made: dict[tuple[Any, ...], tuple[Tensor, tuple[Tensor, ...]]] = field(default_factory=dict)


# Not a context variable: on a GPU backward passes, and what is computed again in them, run in threads of their own.
_now: _Steady | None = None


@contextmanager
def steady(*, adds: bool = False) -> Iterator[None]:
    """Inside, the caller changes no parameter: `fused` makes each matrix once instead of for every micro-batch.

    What is made is let go at the end. With `adds`, backward passes of what was computed inside add to the parameters'
    `.grad` themselves where that is cheaper; then `torch.autograd.grad` sees no gradient and hooks on gradients do not
    run.
    """
    global _now
    before, _now = _now, _Steady(adds)
    try:
        yield
    finally:
        _now = before


def fused(dtype: torch.dtype, *parts: Tensor) -> Tensor:
    """Matrices [O_i, I] of one width -> one matrix [ΣO_i, I] in another type; gradients go back in their own types."""
    if len(parts) == 1 and parts[0].dtype == dtype:
        return parts[0]
    key, state = (dtype, *map(id, parts)), _now or _Steady(adds=False)
    if key not in state.made:
        state.made[key] = joined(None, parts, dtype), parts
    return _Fuse.apply(state.made[key][0], state.adds, *parts)  # type: ignore[no-any-return, no-untyped-call, unused-ignore]


def embedded(tokens: Tensor, weight: Tensor) -> Tensor:
    """tokens int64 [N], weight [V,H] -> weight[tokens] [N,H]."""
    # Only on CPUs is adding by index done in a fixed order.
    if _now is not None and _now.adds and weight.device.type == "cpu":
        return _Embed.apply(tokens, weight)  # type: ignore[no-any-return, no-untyped-call, unused-ignore]
    return torch.nn.functional.embedding(tokens, weight)


class _Fuse(torch.autograd.Function):
    """`whole`, which holds the values of `parts` on top of one another, with gradients for the parts."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, adds: bool, *parts: Tensor) -> Tensor:
        ctx.parts, ctx.adds = parts, adds
        return whole.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = []
        pieces = gradient.split([len(part) for part in ctx.parts])
        for piece, part, needed in zip(pieces, ctx.parts, ctx.needs_input_grad[2:], strict=True):
            if needed and ctx.adds and part.is_leaf:
                _add(part, piece)
                needed = False
            found.append(piece.to(part.dtype) if needed else None)
        return None, None, *found


class _Embed(torch.autograd.Function):
    """Rows of a table; their gradients are added to those rows of its `.grad`, once there is one."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.weight = weight
        return weight.index_select(0, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None]:
        (tokens,), weight = ctx.saved_tensors, ctx.weight
        if not ctx.needs_input_grad[1]:
            return None, None
        if weight.is_leaf and weight.grad is not None:
            weight.grad.index_add_(0, tokens, gradient)
            return None, None
        return None, torch.ops.aten.embedding_dense_backward(gradient, tokens, len(weight), -1, False)


def _add(parameter: Tensor, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype, copy=True)
        return
    rows = _ROWS if parameter.device.type == "cpu" else len(parameter)  # a GPU converts as it adds
    for mine, new in zip(parameter.grad.split(rows), gradient.split(rows), strict=True):
        mine.add_(new)

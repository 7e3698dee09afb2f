"""How parameters enter a forward, and how their gradients leave it.

Autograd makes each parameter's gradient anew in every backward pass and then adds it to `.grad`; for matrices that
multiply in bfloat16 that means a copy of each in float32, and for an embedding a table of zeros. Where the caller asks
for it (`steady(adds=True)`), gradients are added to `.grad` where they arise, by the product itself if it can, and
autograd gets none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mrlm_cli.kernels.products import add_weight_gradient, adds_gradients, joined, weight_gradient

# Rows of a matrix that are converted at a time, so that no copy of a whole head lies beside its gradient.
_ROWS = 2048


@dataclass(slots=True)
class _Steady:
    adds: bool
    # What `_made` made, with its parts: parts that live cannot lend their id to others.
    made: dict[tuple[Any, ...], tuple[Tensor, tuple[Tensor, ...]]] = field(default_factory=dict)


# Not a context variable: on a GPU backward passes, and what is computed again in them, run in threads of their own.
_now: _Steady | None = None


@contextmanager
def steady(*, adds: bool = False) -> Iterator[None]:
    """Inside, the caller changes no parameter: each matrix is converted once instead of for every micro-batch.

    What is made is let go at the end. With `adds`, backward passes of what was computed inside add to the parameters'
    `.grad` themselves where that is cheaper; then hooks on them are given None, and `torch.autograd.grad` sees no
    gradient of them and fills `.grad`.
    """
    global _now
    before, _now = _now, _Steady(adds)
    try:
        yield
    finally:
        _now = before


@dataclass(frozen=True, slots=True)
class Shares:
    """The matrices [O_i, I] that a factor was made of, and whether their gradients may be added where they arise."""

    parts: tuple[Tensor, ...]
    adds: bool

    def gradients(self, of_y: Tensor, x: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
        """of_y [N,ΣO_i], x [N,I], in the type of the factor, of y = x factorᵀ -> for autograd those that are needed.

        None for the others, and for those that were added to `.grad`.
        """
        found: list[Tensor | None] = [None] * len(self.parts)
        if not any(needed):
            return found
        widths = [len(part) for part in self.parts]
        # Without the kernel one product is less work than several.
        made = None if adds_gradients(of_y, x) else weight_gradient(of_y, x).split(widths)
        for number, (part, piece) in enumerate(zip(self.parts, of_y.split(widths, dim=1), strict=True)):
            if not needed[number]:
                continue
            here = self.adds and part.is_leaf
            if here and part.grad is not None and made is None and add_weight_gradient(part.grad, piece, x):
                continue
            gradient = weight_gradient(piece, x) if made is None else made[number]
            if here:
                _add(part, gradient)
            else:
                found[number] = gradient.to(part.dtype)
        return found


@dataclass(frozen=True, slots=True)
class Factor:
    """Matrices [O_i, I] of one width on top of one another, in the type in which they multiply."""

    whole: Tensor  # [ΣO_i, I], outside of autograd
    shares: Shares

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """What autograd has to know of."""
        return self.shares.parts


def factor(dtype: torch.dtype, *parts: Tensor) -> Factor:
    """What products with these matrices [O_i, I] of one width multiply by."""
    whole, adds = _made(dtype, parts)
    return Factor(whole, Shares(parts, adds))


def fused(dtype: torch.dtype, *parts: Tensor) -> Tensor:
    """Biases [O_i] -> one bias [ΣO_i] in another type; gradients go back in their own types."""
    whole, adds = _made(dtype, parts)
    return _Fuse.apply(whole, adds, *parts)  # type: ignore[no-any-return, no-untyped-call, unused-ignore]


def _made(dtype: torch.dtype, parts: tuple[Tensor, ...]) -> tuple[Tensor, bool]:
    """`parts` on top of one another in `dtype`, and whether their gradients may be added where they arise."""
    state = _now or _Steady(adds=False)
    if len(parts) == 1 and parts[0].dtype == dtype:
        return parts[0].detach(), state.adds
    key = (dtype, *map(id, parts))
    if key not in state.made:
        state.made[key] = joined(None, parts, dtype), parts
    return state.made[key][0], state.adds


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
        shared = gradient._base is not None  # a piece of what others have pieces of
        parameter.grad = gradient.to(parameter.dtype, copy=shared)
        return
    rows = _ROWS if parameter.device.type == "cpu" else len(parameter)  # a GPU converts as it adds
    for mine, new in zip(parameter.grad.split(rows), gradient.split(rows), strict=True):
        mine.add_(new)

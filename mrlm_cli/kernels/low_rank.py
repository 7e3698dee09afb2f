"""Weight matrices with low-rank adapters: W x + scale · up (down x), after Hu et al. 2021, "LoRA", §4.1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mrlm_cli.kernels import native
from mrlm_cli.kernels.functions import Linear
from mrlm_cli.kernels.parameters import factor


@dataclass(frozen=True, slots=True)
class Adapter:
    """A change of rank r to a matrix [O,I]: scale · up · down."""

    down: Tensor  # [r,I]
    up: Tensor  # [O,r]
    scale: float

    def add(self, product: Tensor, x: Tensor) -> Tensor:
        """product [N,O] = x Wᵀ and x [N,I], both in the compute type -> x (W + scale · up · down)ᵀ [N,O]."""
        up = self.up.to(x.dtype)
        if not native.crawls(x):
            inner = nn.functional.linear(x, self.down.to(x.dtype)) * self.scale
            return torch.addmm(product, inner, up.t())
        down = factor(x.dtype, self.down)
        inner = Linear.apply(x, down, *down.parts) * self.scale
        return torch.addmm(product.float(), inner.float(), up.float().t()).to(x.dtype)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight [O,I] and its adapter, if it has one."""

    weight: Tensor
    adapter: Adapter | None = None

    def merged(self) -> Tensor:
        """W + scale · up · down [O,I] in the weight's type; the weight itself where there is no adapter."""
        if self.adapter is None:
            return self.weight
        return self.weight + (self.adapter.up @ self.adapter.down) * self.adapter.scale


def adapted(product: Tensor, x: Tensor, matrices: Sequence[Matrix]) -> Tensor:
    """product [N,ΣO_i], x times matrices on top of one another, and x [N,I] -> with each one's adapter [N,ΣO_i]."""
    if all(matrix.adapter is None for matrix in matrices):
        return product
    pieces = [
        piece if matrix.adapter is None else matrix.adapter.add(piece, x)
        for piece, matrix in zip(product.split([len(each.weight) for each in matrices], -1), matrices, strict=True)
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)


def matrix(module: Any) -> Matrix | None:
    """The matrix that a linear layer multiplies by; None if the layer does anything else, its bias apart.

    Understood are torch's Linear and peft's LoRA layer around one, with one adapter that is switched on, not merged and
    of the plain kind (no dropout, no bias of its own, no variant such as DoRA).
    """
    if type(module) is nn.Linear:
        return Matrix(module.weight)
    if f"{type(module).__module__}.{type(module).__name__}" != "peft.tuners.lora.layer.Linear":
        return None
    base, names = module.base_layer, list(module.active_adapters)
    if type(base) is not nn.Linear or len(names) != 1 or list(module.lora_A) != names:
        return None
    if (
        module.disable_adapters
        or module.merged
        or module.lora_variant
        or type(module.lora_dropout[names[0]]) is not (nn.Identity)
    ):
        return None
    down, up = module.lora_A[names[0]], module.lora_B[names[0]]
    if type(down) is not nn.Linear or type(up) is not nn.Linear or down.bias is not None or up.bias is not None:
        return None
    return Matrix(base.weight, Adapter(down.weight, up.weight, float(module.scaling[names[0]])))

"""Matrix products of linear layers, each by the fastest library at hand for its type; all true to that type.

On CPUs oneDNN multiplies float32 faster than torch's default library; the sums are float32 either way.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
# Below this many multiplications the call costs more than it gains.
_SMALLEST = 2**22


def _by_onednn(x: Tensor, rows: int) -> bool:
    return (
        _ONEDNN is not None
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.shape[0] * x.shape[1] * rows >= _SMALLEST
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [N,I], weight [O,I], bias [O] -> x weightᵀ + bias [N,O]. Not differentiable where oneDNN is used."""
    if _by_onednn(x, weight.shape[0]):
        assert _ONEDNN is not None
        product: Tensor = _ONEDNN(x, weight, bias, "none", [], "")
        return product
    return torch.nn.functional.linear(x, weight, bias)


def input_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """gradient [N,O], weight [O,I] -> [N,I]."""
    if _by_onednn(gradient, weight.shape[1]):
        assert _ONEDNN is not None
        product: Tensor = _ONEDNN(gradient, weight.t(), None, "none", [], "")
        return product
    return gradient @ weight


def weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """gradient [N,O], x [N,I] -> [O,I]. Here both factors would have to be transposed first, which eats the gain."""
    return gradient.t() @ x

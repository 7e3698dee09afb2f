"""Matrix products of linear layers, each by the fastest library at hand for its type; all true to that type.

On CPUs oneDNN multiplies float32 faster than torch's default library; the sums are float32 either way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mrlm_cli.kernels.low_rank import Matrix

_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
# Below this many multiplications the call costs more than it gains.
_SMALLEST = 2**22
# Numbers in a matrix from which on a layout of its own pays, and the rows of x that the layout is chosen for.
_WORTH_LAYING_OUT = 2**16
_ROWS = 32


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


class FrozenLinear:
    """x [N,I] -> x weightᵀ + bias [N,O] in `dtype`, over a copy of the weights laid out once for the fastest product.

    `parts` are matrices [O_i, I] of one width, put on top of one another. `load` takes their present values, adapters
    merged. Without oneDNN (another device, another type, or a small matrix) nothing is laid out, and a single part in
    the right type without adapter is not even copied. Nothing here is differentiable.
    """

    def __init__(self, parts: Sequence[Matrix], biases: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._parts = tuple(parts)
        self._biases = tuple(biases)
        self._dtype = dtype
        self._bias: Tensor | None = None
        self._weight: Tensor = parts[0].weight

    @torch.no_grad()
    def load(self) -> None:
        """Take the present values of the parts."""
        parts = [part.merged().detach().to(self._dtype) for part in self._parts]
        weight = parts[0] if len(parts) == 1 else torch.cat(parts)
        self._bias = torch.cat([bias.detach().to(self._dtype) for bias in self._biases]) if self._biases else None
        self._laid_out = (
            _ONEDNN is not None
            and weight.device.type == "cpu"
            and weight.dtype in (torch.float32, torch.bfloat16)
            and weight.numel() >= _WORTH_LAYING_OUT
        )
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS) if self._laid_out else weight

    def release(self) -> None:
        """Give up the copy; `load` comes before the next product."""
        self._weight, self._bias = self._parts[0].weight, None

    def __call__(self, x: Tensor) -> Tensor:
        """x [N,I] in `dtype` -> [N,O]."""
        if self._laid_out:
            assert _ONEDNN is not None
            product: Tensor = _ONEDNN(x, self._weight, self._bias, "none", [], "")
            return product
        return torch.nn.functional.linear(x, self._weight, self._bias)

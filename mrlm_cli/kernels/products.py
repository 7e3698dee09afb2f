"""Matrix products of linear layers, each by the fastest way at hand for its type; all true to that type.

On an x86 CPU with AVX2 or AVX-512 (in bfloat16 not where AVX-512 lacks it, or there are tiles for it) that is a kernel
in C, whose sums are in one order whatever the number of rows or threads, and which adds gradients of weights in float32
to what is there. Elsewhere, and for many rows of float32, it is torch's product, or on CPUs oneDNN's, which multiplies
float32 faster than torch's default library; the sums are float32 either way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mrlm_cli.kernels import native

if TYPE_CHECKING:
    from mrlm_cli.kernels.low_rank import Matrix

_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
# Below this many multiplications the call costs more than it gains.
_SMALLEST = 2**22
# From so many rows of float32 on it is faster than the kernel.
_MANY = 256
# Numbers in a matrix from which on a layout of its own pays, and the rows of x that the layout is chosen for.
_WORTH_LAYING_OUT = 2**16
_ROWS = 32
# Which factor the kernel takes turned (`c/products.c`).
_SECOND, _NEITHER, _FIRST = range(3)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [N,I], weight [O,I], bias [O], one type -> x weightᵀ + bias [N,O]. Not differentiable."""
    if (library := _rows_kernel(x, weight, bias)) is not None:
        out = x.new_empty(len(x), len(weight))
        _multiply(library, _SECOND, x, weight, bias, out, adds=False)
        return out
    if _by_onednn(x, weight.shape[0]):
        return _onednn_product(x, weight, bias)
    return _by_torch(x, weight, bias)


def input_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """gradient [N,O], weight [O,I], one type -> [N,I]."""
    if (library := _rows_kernel(gradient, weight)) is not None:
        out = gradient.new_empty(len(gradient), weight.shape[1])
        _multiply(library, _NEITHER, gradient, weight, None, out, adds=False)
        return out
    if _by_onednn(gradient, weight.shape[1]):
        return _onednn_product(gradient, weight.t(), None)
    return _by_torch(gradient, weight.t(), None)


def weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """gradient [N,O], x [N,I], one type -> gradientᵀ x [O,I], in float32 by the kernel, else in that type."""
    if (library := _kernel(gradient, x)) is not None:
        out = x.new_empty(gradient.shape[1], x.shape[1], dtype=torch.float32)
        _multiply(library, _FIRST, gradient, x, None, out, adds=False)
        return out
    # oneDNN would have to transpose both factors first, which eats the gain.
    return _by_torch(gradient.t(), x.t(), None)


def add_weight_gradient(total: Tensor, gradient: Tensor, x: Tensor) -> bool:
    """Add gradientᵀ x of gradient [N,O] and x [N,I] to `total` [O,I] by the kernel.

    False, and nothing done, without it, or if `total` is not float32 in one piece.
    """
    library = _kernel(gradient, x)
    if library is None or total.dtype != torch.float32 or not total.is_contiguous():
        return False
    _multiply(library, _FIRST, gradient, x, None, total, adds=True)
    return True


def adds_gradients(gradient: Tensor, x: Tensor) -> bool:
    """Whether `add_weight_gradient` can do this product."""
    return _kernel(gradient, x) is not None


def _kernel(x: Tensor, y: Tensor, bias: Tensor | None = None) -> native.Library | None:
    library = native.on(x, y, bias)
    if library is None or not library.can_multiply(native.narrow(x)):
        return None
    return library if all(each is None or each.dtype == x.dtype for each in (y, bias)) else None


def _rows_kernel(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> native.Library | None:
    """For products with the rows of x."""
    library = _kernel(x, weight, bias)
    if library is None or not _in_units(library, x):
        return None
    return None if x.shape[0] >= _MANY and _by_onednn(x, weight.numel() // x.shape[1]) else library


def _in_units(library: native.Library, x: Tensor) -> bool:
    """Whether the kernel can read rows of x [N,I] unit by unit (`c/products.c`)."""
    return x.dtype != torch.bfloat16 or x.shape[1] % library.pair == 0


def _multiply(
    library: native.Library, form: int, x: Tensor, y: Tensor, bias: Tensor | None, out: Tensor, *, adds: bool
) -> None:
    x, y = (each if each.stride(1) == 1 else each.contiguous() for each in (x, y))
    (rows, inner), (again, columns) = (x.t() if form == _FIRST else x).shape, (y.t() if form == _SECOND else y).shape
    assert (again, *out.shape) == (inner, rows, columns)  # pointers know no shapes
    assert bias is None or len(bias) == columns
    threads = native.threads(rows * columns * inner >> 5)
    narrow = native.narrow(x)
    scratch = out.new_empty(library.product_scratch(rows, inner, form, narrow, threads), dtype=torch.float32)
    native.run(
        library.product,
        x.data_ptr(),  # rows may lie apart
        y.data_ptr(),
        None if bias is None else bias.contiguous(),
        out,
        scratch,
        rows,
        inner,
        columns,
        x.stride(0),
        y.stride(0),
        columns,
        form,
        adds,
        like=x,
        threads=threads,
    )


def _by_torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not native.crawls(x):
        return torch.nn.functional.linear(x, weight, bias)
    assert weight.dtype == x.dtype
    wide = None if bias is None else bias.float()
    return torch.nn.functional.linear(x.float(), weight.float(), wide).bfloat16()


def _by_onednn(x: Tensor, rows: int) -> bool:
    return (
        _ONEDNN is not None
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.shape[0] * x.shape[1] * rows >= _SMALLEST
    )


class FrozenLinear:
    """x [N,I] -> x weightᵀ + bias [N,O] in `dtype`, over a copy of the weights laid out once for the fastest product.

    `parts` are matrices [O_i, I] of one width, put on top of one another. `load` takes their present values, adapters
    merged. Where nothing is laid out (another device, another type, or a small matrix) a single part in the right type
    without adapter is not even copied, and other copies stay in the memory of the first load. Nothing here is
    differentiable.
    """

    def __init__(self, parts: Sequence[Matrix], biases: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._parts = tuple(parts)
        self._biases = tuple(biases)
        self._dtype = dtype
        self._bias: Tensor | None = None
        self._weight: Tensor = parts[0].weight
        self._copy: Tensor | None = None
        self._multiply: Callable[[Tensor, Tensor, Tensor | None], Tensor] = _by_torch

    @torch.no_grad()
    def load(self) -> None:
        """Take the present values of the parts."""
        first = self._parts[0]
        biases = [bias.detach() for bias in self._biases]
        self._bias = joined(self._bias, biases, self._dtype) if biases else None
        shared = len(self._parts) == 1 and first.adapter is None and first.weight.dtype == self._dtype
        weight = (
            first.weight.detach()
            if shared
            else joined(self._copy, [part.merged().detach() for part in self._parts], self._dtype)
        )
        self._weight, self._multiply = _laid_out(weight)
        self._copy = None if shared or self._weight is not weight else weight

    def release(self) -> None:
        """Give up the copy; `load` comes before the next product."""
        self._weight, self._bias, self._copy = self._parts[0].weight, None, None
        self._multiply = _by_torch

    @property
    def memory(self) -> list[Tensor]:
        """What a product reads besides x."""
        return [self._weight] if self._bias is None else [self._weight, self._bias]

    def __call__(self, x: Tensor) -> Tensor:
        """x [N,I] in `dtype` -> [N,O]."""
        return self._multiply(x, self._weight, self._bias)


def _laid_out(weight: Tensor) -> tuple[Tensor, Callable[[Tensor, Tensor, Tensor | None], Tensor]]:
    """weight [O,I] -> the same in the layout of the fastest product of few rows with it, and that product."""
    outputs, inputs = weight.shape
    library = native.on(weight)
    if library is not None and library.can_multiply(native.narrow(weight)) and _in_units(library, weight):
        weight = weight.contiguous()
        panels = weight.new_empty(-(-outputs // library.columns) * library.columns, inputs)
        native.run(
            library.lay_out, weight, panels, outputs, inputs, like=weight, threads=native.threads(weight.numel())
        )
        return panels, functools.partial(_by_kernel, library, outputs)
    if (
        _ONEDNN is not None
        and weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and not native.crawls(weight)
        and weight.numel() >= _WORTH_LAYING_OUT
    ):
        return torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS), _onednn_product
    return weight, _by_torch


def _by_kernel(library: native.Library, outputs: int, x: Tensor, panels: Tensor, bias: Tensor | None) -> Tensor:
    assert (x.dtype, x.shape[1]) == (panels.dtype, panels.shape[1])
    x = x.contiguous()
    out = x.new_empty(len(x), outputs)
    scratch = x.new_empty(library.multiply_scratch(*x.shape, native.narrow(x)), dtype=torch.float32)
    threads = native.threads(panels.numel())
    native.run(library.multiply, x, panels, bias, out, scratch, *x.shape, outputs, like=x, threads=threads)
    return out


def _onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    assert _ONEDNN is not None
    product: Tensor = _ONEDNN(x, weight, bias, "none", [], "")
    return product


@torch.no_grad()
def joined(memory: Tensor | None, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """`parts` on top of one another in `dtype`, written into `memory` if there is any."""
    if memory is None:
        memory = parts[0].new_empty((sum(map(len, parts)), *parts[0].shape[1:]), dtype=dtype)
    for piece, part in zip(memory.split([len(part) for part in parts]), parts, strict=True):
        piece.copy_(part)
    return memory

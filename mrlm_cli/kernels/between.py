"""What lies between two products of a layer: RMSNorm and SwiGLU, forward and backward, outside of autograd.

N positions, H width, c the compute type of the products (bfloat16 or the type of the residual stream). By the kernels
in C where they can be had, which round to c once; else by torch's operators.

RMSNorm after Zhang & Sennrich 2019, with the mean square in x's own type: y = x · r · gain for r = 1 / sqrt(mean(x²) +
eps), and dx = r · (dn − n · mean(dn · n)) for n = x · r and dn = dy · gain. SwiGLU after Shazeer 2020, "GLU Variants
Improve Transformer": y = silu(gate) · up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mrlm_cli.kernels import native


def rms_norm(x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [N,H], gain [H] -> y [N,H] in `dtype`, r [N,1]."""
    if (library := native.on(x, gain)) and dtype in (torch.float32, torch.bfloat16) and _wide(x, gain):
        out, scale = torch.empty_like(x, dtype=dtype), x.new_empty(len(x), 1)
        _norm(library, x, None, gain, eps, out, scale)
        return out, scale
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x * scale).mul_(gain).to(dtype), scale


def add_rms_norm(
    x: Tensor, addend: Tensor | None, gain: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x [N,H], addend [N,H] in `dtype`, gain [H] -> x + addend, which may be x's own memory, and its norm y in `dtype`.

    Where nothing is differentiated.
    """
    library = native.on(x, gain, addend)
    if library and dtype in (torch.float32, torch.bfloat16) and _wide(x, gain):
        assert addend is None or addend.dtype == dtype
        out = torch.empty_like(x, dtype=dtype)
        _norm(library, x, addend, gain, eps, out, None)
        return x, out
    if addend is not None:
        x = x + addend
    return x, torch.nn.functional.rms_norm(x, (x.shape[-1],), gain, eps).to(dtype)


def _wide(*tensors: Tensor) -> bool:
    return all(each.dtype == torch.float32 for each in tensors)


def _norm(
    library: native.Library,
    x: Tensor,
    addend: Tensor | None,
    gain: Tensor,
    eps: float,
    out: Tensor,
    scale: Tensor | None,
) -> None:
    rows, width = x.shape
    native.run(
        library.rms_norm, x, addend, gain, eps, out, scale, rows, width, like=out, threads=native.threads(x.numel())
    )


def rms_norm_backward(
    of_y: Tensor, besides: Tensor | None, x: Tensor, gain: Tensor, scale: Tensor, *, again: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """of_y and besides [N,H] in c, whose sum is y's gradient; x [N,H], gain [H], r [N,1] -> those of x and gain, and y.

    y [N,H] in c is made `again` only if asked for.
    """
    dtype = of_y.dtype
    if (library := native.on(of_y, x, gain)) and _wide(x, gain):
        of_y, besides = of_y.contiguous(), None if besides is None else besides.to(dtype).contiguous()
        rows, width = x.shape
        count = native.threads(x.numel())
        of_x, of_gain = torch.empty_like(x), x.new_zeros(count, width)
        y = torch.empty_like(of_y) if again else None
        native.run(
            library.rms_norm_backward,
            of_y,
            besides,
            x,
            gain,
            scale,
            of_x,
            of_gain,
            y,
            rows,
            width,
            like=of_y,
            threads=count,
        )
        return of_x, of_gain.sum(0), y
    of_normed = of_y.to(x.dtype, copy=True)
    if besides is not None:
        of_normed += besides
    unit = x * scale
    y = (unit * gain).to(dtype) if again else None
    of_gain = (of_normed * unit).sum(0)
    of_unit = of_normed.mul_(gain)
    of_x = of_unit.sub_(unit.mul_((of_unit * unit).mean(-1, keepdim=True))).mul_(scale)
    return of_x, of_gain, y


def swiglu(both: Tensor) -> Tensor:
    """Gate and up side by side [N,2I] -> y [N,I]."""
    rows, width = len(both), both.shape[1] // 2
    if library := native.on(both):
        y = both.new_empty(rows, width)
        native.run(library.swiglu, both, y, rows, width, like=both, threads=native.threads(8 * y.numel()))
        return y
    gate, up = both.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


def swiglu_backward(of_y: Tensor, besides: Tensor | None, both: Tensor, *, again: bool) -> tuple[Tensor, Tensor | None]:
    """of_y and besides [N,I], whose sum is y's gradient, and both [N,2I] -> that of both, and y if made `again`."""
    rows, width = len(both), both.shape[1] // 2
    out = torch.empty_like(both)
    if library := native.on(of_y, besides, both):
        of_y = of_y.to(both.dtype).contiguous()
        besides = None if besides is None else besides.to(both.dtype).contiguous()
        y = torch.empty_like(of_y) if again else None
        native.run(
            library.swiglu_backward,
            of_y,
            besides,
            both,
            out,
            y,
            rows,
            width,
            like=both,
            threads=native.threads(8 * of_y.numel()),
        )
        return out, y
    if besides is not None:
        of_y = of_y + besides
    gate, up = both.chunk(2, dim=-1)
    silu = torch.nn.functional.silu(gate)
    of_gate, of_up = out.chunk(2, dim=-1)
    torch.mul(of_y, silu, out=of_up)
    y = silu * up if again else None
    torch.ops.aten.silu_backward(of_y * up, gate, grad_input=of_gate)
    return out, y

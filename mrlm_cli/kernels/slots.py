"""One query of each row against the keys and values of its slot: what attention is in a decoding step."""

from __future__ import annotations

import torch
from torch import Tensor

from mrlm_cli.kernels import native
from mrlm_cli.kernels.attention import Heads


def can_attend(like: Tensor, heads: Heads, width: int) -> bool:
    """Whether `attend` works on tensors like this one, with heads of so many numbers."""
    library = native.on(like)
    return (
        library is not None
        and like.dtype == torch.float32
        and width % library.lanes == 0
        and width <= library.widest_head
    )


def attend(
    projected: Tensor,  # [B, (heads+2·kv_heads)·d], float32 or bfloat16: not rotated yet
    angles: tuple[Tensor, Tensor],  # cos, sin [B, d/2]
    keys: Tensor,  # float32 [slots, kv_heads, capacity, d]; row b has slot b
    values: Tensor,
    positions: Tensor,  # int64 [B], below capacity
    heads: Heads,
    scaling: float,
) -> Tensor:
    """Rotate, write each row's key and value at its position, and attend up to there: [B, heads·d] like `projected`."""
    library = native.on(projected, keys)
    assert library is not None
    rows, capacity, width = len(projected), keys.shape[2], keys.shape[3]
    threads = min(rows * heads.keys, native.threads(rows * capacity * width))
    out = projected.new_empty(rows, heads.queries * width)
    scores = keys.new_empty(threads * library.together * capacity)
    native.run(
        library.attend_slots,
        projected,
        *angles,
        keys,
        values,
        positions,
        out,
        scores,
        rows,
        heads.queries,
        heads.keys,
        width,
        capacity,
        scaling,
        like=projected,
        threads=threads,
    )
    return out

"""One forward over slots for models of Llama shape, written out: the same numbers as `Forward`, with less work.

The weights of the linear layers are one copy in the decoding type, adapters merged, laid out for products with few
rows; norms, embeddings and rotary angles are the model's own, and the residual stream and attention are in their type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mrlm_cli.engines.cached.cache import SlotCache, Write
from mrlm_cli.kernels import native, slots
from mrlm_cli.kernels.attention import Heads, rotate_
from mrlm_cli.kernels.between import add_rms_norm, swiglu
from mrlm_cli.kernels.llama import WRITTEN_OUT, Trunk, causal, plain_linear
from mrlm_cli.kernels.low_rank import Matrix
from mrlm_cli.kernels.products import FrozenLinear

_NO_ANGLES = (torch.empty(0), torch.empty(0))


class LlamaForward:
    """Drives a Llama-shaped causal LM over a SlotCache."""

    def __init__(self, module: Any, trunk: Trunk, dtype: torch.dtype) -> None:
        self.module = module
        self._trunk = trunk
        self._dtype = dtype
        self._layers = [
            (
                layer,
                FrozenLinear(layer.qkv, layer.qkv_bias, dtype),
                FrozenLinear([layer.out], [], dtype),
                FrozenLinear(layer.gate_up, [], dtype),
                FrozenLinear([layer.down], [], dtype),
            )
            for layer in trunk.layers
        ]
        self._tensors = [*module.parameters(), *module.buffers()]
        self._head = FrozenLinear([Matrix(module.get_output_embeddings().weight)], [], dtype)
        self._table = _NO_ANGLES  # rotary angles of the positions from 0
        self.refresh()

    @staticmethod
    def of(module: Any, precision: str) -> LlamaForward | None:
        """The forward of `module`, or None if it is of another shape."""
        trunk = Trunk.of(module.base_model)
        head = module.get_output_embeddings()
        if trunk is None or not plain_linear(head) or head.bias is not None:
            return None
        if getattr(module.config, "final_logit_softcapping", None) is not None:
            return None
        return LlamaForward(module, trunk, torch.bfloat16 if precision == "bfloat16" else head.weight.dtype)

    def refresh(self) -> None:
        """Take the present weights of the module."""
        for _, *products in self._layers:
            for product in products:
                product.load()
        self._head.load()

    def release(self) -> None:
        """Give up the copies of the weights."""
        for _, *products in self._layers:
            for product in products:
                product.release()
        self._head.release()
        self._table = _NO_ANGLES

    def memory(self) -> list[Tensor]:
        """Every tensor that `run` reads besides its arguments and the cache."""
        products = [product for _, *products in self._layers for product in products]
        return [*self._tensors, *(tensor for product in (*products, self._head) for tensor in product.memory)]

    def run(
        self,
        cache: SlotCache,
        write: Write,
        tokens: Tensor,  # int64 [B, Q]
        positions: Tensor,  # int64 [B, Q]
        last: Tensor | None,  # int64 [B]: where each row's logits are asked for; None: Q is 1
    ) -> Tensor:
        """See `Forward`."""
        cache.write = write
        flat, at = tokens.flatten(), positions.flatten()
        if write.real is not None:  # nothing but attention's own products knows of padding
            flat, at = flat[write.real], at[write.real]
        x = self._trunk.model.embed_tokens(flat)  # [N, H] of the N real tokens
        angles = self._angles(x, at, max(tokens.shape[1], write.width))
        attend = self._attention(cache, write, x, positions, angles)
        addend: Tensor | None = None
        for number, (layer, qkv, out, gate_up, down) in enumerate(self._layers):
            x, normed = self._norm(x, addend, layer.input_norm)
            attended = attend(number, self._trunk.norm_heads(qkv(normed), layer))
            x, normed = self._norm(x, out(attended), layer.mlp_norm)
            addend = down(swiglu(gate_up(normed)))
        cache.write = None
        if last is not None:
            assert addend is not None
            ends = last + torch.arange(len(tokens), device=x.device) * tokens.shape[1]
            if write.real is not None:
                ends = (last + 1).cumsum(0) - 1
            x, addend = x[ends] + addend[ends], None
        logits: Tensor = self._head(self._norm(x, addend, self._trunk.model.norm.weight)[1])
        return logits

    def _angles(self, x: Tensor, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [N, d/2] at positions [N] below `length`; looked up where the kernels in C are used."""
        if native.on(x) is None:
            return self._trunk.angles(x, positions)
        if len(self._table[0]) < length:
            self._table = self._trunk.angles(x, torch.arange(2 * length))
        cos, sin = self._table
        return cos.index_select(0, positions), sin.index_select(0, positions)

    def _norm(self, x: Tensor, addend: Tensor | None, gain: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, addend, gain, self._trunk.eps, self._dtype)

    def _attention(
        self, cache: SlotCache, write: Write, x: Tensor, positions: Tensor, angles: tuple[Tensor, Tensor]
    ) -> Callable[[int, Tensor], Tensor]:
        """Maps a layer's number and projected [N,(heads+2·kv_heads)·d] to [N, heads·d], in the decoding type."""
        queries = positions.shape[1]
        trunk = self._trunk
        heads = Heads(trunk.heads, trunk.kv_heads)
        if queries == 1 and write.slots is None and slots.can_attend(x, heads, 2 * angles[0].shape[-1]):
            at = positions.flatten()
            assert bool((at < cache.capacity).all())  # the kernel writes where it is told
            return lambda number, projected: slots.attend(
                projected, angles, *cache.pools(number), at, heads, trunk.scaling
            )
        keys = torch.arange(write.width, device=x.device)
        hidden = keys > positions[:, None, :, None]  # [B, 1, Q, width]
        mask = torch.zeros(hidden.shape, dtype=x.dtype, device=x.device).masked_fill_(hidden, -torch.inf)
        return lambda number, projected: self._attend(cache, number, projected, angles, mask).to(self._dtype)

    def _attend(
        self,
        cache: SlotCache,
        number: int,
        projected: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor,
    ) -> Tensor:
        """projected [N,(heads+2·kv_heads)·d] of the real tokens -> [N, heads·d] in the type of the residual stream."""
        rows, _, queries, _ = mask.shape
        heads, kv_heads = self._trunk.heads, self._trunk.kv_heads
        real = None if cache.write is None else cache.write.real
        x = projected.to(mask.dtype, copy=True).view(len(projected), heads + 2 * kv_heads, -1)
        rotate_(x[:, : heads + kv_heads], *angles)
        if real is not None:
            x = x.new_zeros(rows * queries, *x.shape[1:]).index_copy_(0, real, x)
        x = x.view(rows, queries, heads + 2 * kv_heads, -1).transpose(1, 2)  # [B, all heads, Q, d]
        query, key, value = x.split([heads, kv_heads, kv_heads], dim=1)
        keys, values = cache.update(key, value, number)  # [B, kv_heads, width, d]
        # Written out, the rows of a step read each key once, whatever the number of queries that share it.
        if queries > (WRITTEN_OUT if mask.device.type == "cpu" else 1):
            attended = causal(query, keys, values, mask, self._trunk.scaling)
        else:
            shared = query.reshape(rows, kv_heads, -1, query.shape[-1])  # [B, kv_heads, g x Q, d]
            scores = (shared @ keys.transpose(2, 3)).mul_(self._trunk.scaling)
            scores.view(rows, heads, queries, -1).add_(mask)
            attended = torch.softmax(scores, dim=-1) @ values
            attended = attended.view(rows, heads, queries, -1)
        attended = attended.transpose(1, 2).reshape(rows * queries, -1)
        return attended if real is None else attended[real]

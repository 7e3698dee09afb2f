"""The trunk of Llama-shaped models (Llama, Mistral, Qwen2, Qwen3) over the parameters of a transformers module.

transformers' own forward stays the reference: `Trunk.of` returns None for whatever is not exactly of this shape, and
tests hold the two equal, gradients included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mrlm_cli.kernels.attention import Attention, FusedAttention, Heads, library_for, rotate_
from mrlm_cli.kernels.functions import Linear, NormLinear, Spread, SwiGLULinear
from mrlm_cli.kernels.low_rank import Matrix, adapted, matrix
from mrlm_cli.kernels.packing import Packing
from mrlm_cli.kernels.parameters import embedded, factor, fused

# Without the kernels in C, rows up to this long have their attention scores written out on a CPU; longer ones take
# torch's fused attention.
WRITTEN_OUT = 384
_FAMILIES = {f"transformers.models.{name}.modeling_{name}" for name in ("llama", "mistral", "qwen2", "qwen3")}
_ROTARY = {"default", "linear", "llama3", "yarn"}  # kinds whose angles depend on the position alone


@dataclass(frozen=True, slots=True)
class Layer:
    """The parameters of one decoder layer."""

    input_norm: nn.Parameter
    qkv: tuple[Matrix, ...]
    qkv_bias: tuple[nn.Parameter, ...]
    head_norms: tuple[Any, Any] | None  # Qwen3: norms of each head's queries and keys
    out: Matrix
    mlp_norm: nn.Parameter
    gate_up: tuple[Matrix, ...]
    down: Matrix

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """All that multiply."""
        return (*self.qkv, self.out, *self.gate_up, self.down)


class Trunk:
    """Runs a transformers base model (no LM head) of Llama shape over packed positions."""

    def __init__(self, model: Any, layers: list[Layer]) -> None:
        config = model.config
        self.model = model
        self.layers = layers
        self.heads = int(config.num_attention_heads)
        self.kv_heads = int(config.num_key_value_heads)
        self.scaling = float(model.layers[0].self_attn.scaling)
        self.eps = float(config.rms_norm_eps)

    @staticmethod
    def of(model: Any) -> Trunk | None:
        """The trunk of `model`, or None if it is of another shape, hooked, or has had modules put in."""
        if type(model).__module__ not in _FAMILIES or not hasattr(model, "layers"):
            return None
        config: Any = model.config
        kinds = getattr(config, "layer_types", None) or ["full_attention"]
        if getattr(config, "sliding_window", None) is not None or set(kinds) != {"full_attention"}:
            return None
        if config.hidden_act != "silu" or config.rope_parameters.get("rope_type", "default") not in _ROTARY:
            return None
        if getattr(config, "attention_dropout", 0.0):
            return None
        # Only the embedding, the rotary angles and the heads' norms are called as modules: others' hooks would not run.
        if any(hooked(module) for module in model.layers.modules()):
            return None
        layers = [_layer(layer) for layer in model.layers]
        return None if None in layers else Trunk(model, [layer for layer in layers if layer is not None])

    def __call__(
        self, packing: Packing, dtype: torch.dtype | None, checkpointing: bool, nodes: Tensor | None = None
    ) -> Tensor:
        """Hidden states after the last norm [N,H], in the embeddings' type; weight products are in `dtype`, if given.

        With `nodes` int64 [M], distinct, those of them alone [M,H]: of the others the last layer makes keys and values.
        With `checkpointing` a layer's activations are made again in the backward pass.
        """
        x = self._embed(packing.tokens)
        angles = self.angles(x, packing.positions)
        for layer in self.layers:
            given = layer, x, angles, packing, dtype, nodes if layer is self.layers[-1] else None
            if checkpointing:
                x = checkpoint(self._forward, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                x = self._forward(*given)
        return self.last_norm(x)

    def _embed(self, tokens: Tensor) -> Tensor:
        table = self.model.embed_tokens
        if type(table) is nn.Embedding and table.max_norm is None and table.padding_idx is None and not hooked(table):
            return embedded(tokens, table.weight)
        found: Tensor = table(tokens)
        return found

    def last_norm(self, x: Tensor) -> Tensor:
        """x [N,H] -> the trunk's output [N,H], in x's own type throughout."""
        return nn.functional.rms_norm(x, (x.shape[-1],), self.model.norm.weight, self.eps)

    def angles(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions int64 [N] -> cosines and sines of the rotary angles [N,d/2], in the type of `like`."""
        cos, sin = self.model.rotary_emb(like, positions[None])
        half = cos.shape[-1] // 2
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()

    def norm_heads(self, projected: Tensor, layer: Layer) -> Tensor:
        """projected [N,(heads+2·kv_heads)·d]: each head's query and key through its norm, where the family has one."""
        if layer.head_norms is None:
            return projected
        query_norm, key_norm = layer.head_norms
        x = projected.view(len(projected), self.heads + 2 * self.kv_heads, -1)
        query, key, value = x.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        normed = [query_norm(query).to(x.dtype), key_norm(key).to(x.dtype), value]  # fp32 inside
        return torch.cat(normed, dim=1).flatten(1)

    def _forward(
        self,
        layer: Layer,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        packing: Packing,
        dtype: torch.dtype | None,
        nodes: Tensor | None,
    ) -> Tensor:
        dtype = dtype or x.dtype
        bias = fused(dtype, *layer.qkv_bias) if layer.qkv_bias else None
        projected = self._after_norm(x, layer.input_norm, layer.qkv, bias, dtype)
        projected = self.norm_heads(projected, layer)
        attended = self._attend(projected, angles, packing)
        if nodes is not None:
            x, attended = x.index_select(0, nodes), attended.index_select(0, nodes)
        x = x + _product(attended, layer.out, dtype)
        both = self._after_norm(x, layer.mlp_norm, layer.gate_up, None, dtype)
        down = factor(dtype, layer.down.weight)
        product, gated = SwiGLULinear.apply(both, down, *down.parts)
        return x + adapted(product, gated, (layer.down,))

    def _after_norm(
        self, x: Tensor, gain: Tensor, matrices: tuple[Matrix, ...], bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """x [N,H], normalised, times all `matrices` [N,ΣO_i]."""
        weights = factor(dtype, *(each.weight for each in matrices))
        product, normed = NormLinear.apply(x, gain, bias, self.eps, weights, *weights.parts)
        return adapted(product, normed, matrices)

    def _attend(self, projected: Tensor, angles: tuple[Tensor, Tensor], packing: Packing) -> Tensor:
        heads, kv_heads = self.heads, self.kv_heads
        rows, longest = packing.rows
        if library_for(projected, angles[0], both := Heads(heads, kv_heads)) is not None:
            return FusedAttention.apply(projected.contiguous(), *angles, packing, both, self.scaling)
        if longest <= WRITTEN_OUT and projected.device.type == "cpu":
            return Attention.apply(projected, *angles, packing, both, self.scaling)
        x = projected.to(angles[0].dtype).view(len(angles[0]), heads + 2 * kv_heads, -1)
        turned = Rotate.apply(x[:, : heads + kv_heads], *angles).to(projected.dtype)
        x = torch.cat([turned, x[:, heads + kv_heads :].to(projected.dtype)], dim=1).flatten(1)
        x = Spread.apply(x, packing).view(rows, longest, heads + 2 * kv_heads, -1).transpose(1, 2)
        query, key, value = x.split([heads, kv_heads, kv_heads], dim=1)
        attended = causal(query, key, value, None, self.scaling)
        return attended.transpose(1, 2).reshape(rows * longest, -1).index_select(0, packing.owner)


def causal(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """query [B,heads,Q,d], key and value [B,kv_heads,K,d] -> [B,heads,Q,d]; without a mask each sees up to itself.

    On a GPU a key is repeated for the queries that share it: where it is not, torch writes out all scores unless the
    type is a narrow one and there is no mask.
    """
    shared = query.device.type == "cpu"
    if not shared:
        key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value))
    return nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=shared
    )


def plain_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer and nothing else: no subclass, no hooks."""
    return type(module) is nn.Linear and not hooked(module)


def hooked(module: nn.Module) -> bool:
    """Whether something else runs before or after a module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _product(x: Tensor, matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """x [N,I] in `dtype` times a matrix and its adapter [N,O]."""
    weight = factor(dtype, matrix.weight)
    return adapted(Linear.apply(x, weight, *weight.parts), x, (matrix,))


class Rotate(torch.autograd.Function):
    """x [N,heads,d] turned by the angles of cos, sin [N,d/2]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        turned = x.clone(memory_format=torch.contiguous_format)
        rotate_(turned, cos, sin)
        return turned

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        turned = gradient.clone(memory_format=torch.contiguous_format)
        rotate_(turned, cos, -sin)
        return turned, None, None


def _layer(layer: Any) -> Layer | None:
    """The parameters of a decoder layer; None if a linear layer of it does something else or has an unknown bias."""
    attention, mlp = layer.self_attn, layer.mlp
    qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
    others = (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    found = [matrix(each) for each in (*qkv, *others)]
    matrices = [each for each in found if each is not None]
    if len(matrices) < len(found) or any(each.bias is not None for each in others):
        return None
    biases = tuple(each.bias for each in qkv if each.bias is not None)
    if len(biases) not in (0, 3):
        return None
    query, key, value, out, gate, up, down = matrices
    return Layer(
        input_norm=layer.input_layernorm.weight,
        qkv=(query, key, value),
        qkv_bias=biases,
        head_norms=(attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None,
        out=out,
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=(gate, up),
        down=down,
    )

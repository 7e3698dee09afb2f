"""The forward of the policy. The shift by one happens here and nowhere else.

hidden[t-1] has seen tokens[:t]  ->  logprobs[t], entropy[t], values[t]  speak of tokens[t] given tokens[:t]
hidden[length-1]                 ->  final_values = V(tokens[:length])
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from mrlm_cli.kernels.functions import Linear
from mrlm_cli.kernels.llama import plain_linear
from mrlm_cli.kernels.logprobs import chunked_logprobs
from mrlm_cli.kernels.parameters import factor, steady
from mrlm_cli.policy.lora import Base
from mrlm_cli.policy.trunk import States, run_trunk, scale_gradient
from mrlm_cli.policy.value import Critic, ValueHead
from mrlm_cli.records import PolicyOut


class Policy(nn.Module):
    """A causal language model with, perhaps, a value function.

    `lm` is a plain transformers causal LM with fp32 weights; `value` a ValueHead on its trunk, a Critic, or None.
    With precision "bfloat16" matrix products run in bf16 over the fp32 weights. Models of Llama shape (`kernels.llama`)
    keep everything else in fp32, attention included. The others run by autocast, with these results in the families
    that the tests cover (Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma 2 and 3, GPT-2): embeddings and the
    residual stream stay fp32; norms compute their statistics in fp32 (RMSNorm by its own cast, LayerNorm because its
    input is fp32; norms whose input is a bf16 product, such as those of queries and keys, round their result to bf16);
    rotary angles and the rotation are fp32, since cosines and sines take the type of the fp32 embeddings; attention
    takes bf16 queries and keys and has its softmax in fp32 inside (the fused kernel's accumulator, or the explicit cast
    of the eager form). The head's product is bf16, its soft cap, the log-softmax and the value head are fp32.
    """

    def __init__(
        self, lm: Any, value: ValueHead | Critic | None, *, precision: str = "float32", trunk_gradient: float = 1.0
    ) -> None:
        super().__init__()
        self.lm = lm
        self.value = value
        self.precision = precision
        self.trunk_gradient = trunk_gradient
        self.base: Base | None = None  # what the adapters of `lm` stand on, if it has adapters

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor,
        score: Tensor,
        *,
        temperature: float,
        entropy: bool = True,
        logprobs: bool = True,
        values: bool = True,
        value_only: bool = False,
    ) -> PolicyOut:
        """tokens int64 [B,T], lengths int64 [B], score bool [B,T] -> PolicyOut, every field [B,T] or [B].

        Right-padded rows; what lies behind `lengths` changes nothing. `score` marks where to speak; everything else
        is zero. With `value_only` no gradient reaches `lm`; without `logprobs` its head, and for a critic its trunk,
        do not run. Raises ValueError if position 0 is to be scored: nothing chose it.
        """
        if bool(score[:, 0].any()):
            raise ValueError("index 0 of a row is never chosen and cannot be scored")
        row, column = score.nonzero(as_tuple=True)
        every, last = torch.arange(len(tokens), device=tokens.device), lengths - 1
        shared = values and isinstance(self.value, ValueHead)
        wanted = torch.zeros_like(score)
        wanted[row, column - 1] = True
        if values and self.value is not None:
            wanted[every, last] = True
        out_logprobs = out_entropy = torch.zeros(tokens.shape, device=tokens.device)
        out_values = final_values = None
        states: States | None = None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not value_only):
            if logprobs or shared:
                states = run_trunk(self.lm.base_model, tokens, lengths, self.precision, wanted)
            if logprobs:
                assert states is not None
                with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                    scored, entropies = chunked_logprobs(
                        states.at(row, column - 1),
                        tokens[row, column],
                        self.head,
                        self.vocabulary,
                        temperature,
                        entropy,
                    )
                out_logprobs = _scatter(scored, row, column, tokens)
                out_entropy = _scatter(entropies, row, column, tokens)
        if values and self.value is not None:
            if isinstance(self.value, Critic):
                states, head = self.value.states(tokens, lengths, self.precision, wanted), self.value.head
            else:
                assert states is not None
                states = States(scale_gradient(states.hidden, self.trunk_gradient), states.node)
                head = self.value
            out_values = _scatter(head(states.at(row, column - 1)), row, column, tokens)
            final_values = head(states.at(every, last))
        return PolicyOut(out_logprobs, out_entropy, out_values, final_values)

    def steady(self, *, adds: bool = False) -> AbstractContextManager[None]:
        """Inside, the caller changes no parameter: weights are converted once, not for every micro-batch.

        With `adds` a backward pass may add to the parameters' `.grad` itself, which saves copies of them.
        """
        return steady(adds=adds)

    @property
    def vocabulary(self) -> int:
        """Width of the logits."""
        return int(self.lm.get_output_embeddings().weight.shape[0])

    def head(self, hidden: Tensor) -> Tensor:
        """hidden [n,H] -> logits [n,V] as the model's own forward makes them: scaled and capped where its config says.

        `load` compares this with the model's forward, so that a family with another head is refused.
        """
        embeddings = self.lm.get_output_embeddings()
        logits: Tensor
        if plain_linear(embeddings) and embeddings.bias is None:
            narrow = torch.is_autocast_enabled(hidden.device.type)
            dtype = torch.bfloat16 if narrow else embeddings.weight.dtype
            weight = factor(dtype, embeddings.weight)
            logits = Linear.apply(hidden.to(dtype), weight, *weight.parts)
        else:
            logits = embeddings(hidden)
        config = self.lm.config
        scale = getattr(config, "logit_scale", None)  # Cohere
        if scale is not None:
            logits = logits * scale
        divisor = getattr(config, "logits_scaling", None)  # Granite
        if divisor is not None:
            logits = logits / divisor
        cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and 3
        if cap is not None:
            logits = torch.tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / cap) * cap
        return logits


def _scatter(items: Tensor, row: Tensor, column: Tensor, like: Tensor) -> Tensor:
    """items [N] at (row, column) of a [B,T] of zeros."""
    return torch.zeros(like.shape, dtype=items.dtype, device=items.device).index_put((row, column), items)

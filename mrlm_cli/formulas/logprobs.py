"""Log-probabilities and entropies of chosen tokens, without ever holding the logits of all of them.

N scored tokens, H width of the hidden state, V words of the vocabulary. The only arrays of size [., V] are those of one
chunk of at most `CHUNK_LOGITS` logits, a fixed rule: no setting, and no memory that happens to be free, changes bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# 128 MiB in fp32. Each further chunk costs a pass over the head's whole gradient [V,H], so that small ones are slow.
CHUNK_LOGITS = 2**25


def chunked_logprobs(
    hidden: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    vocabulary: int,
    temperature: float,
    entropy: bool,
) -> tuple[Tensor, Tensor]:
    """log softmax(head(hidden) / temperature)[target] and the entropy of the same distribution, in nats.

    hidden [N,H], targets int64 [N] -> logprobs [N], entropy [N] (zeros unless `entropy`), both fp32 (float64 if the
    logits are). `head` maps [n,H] to logits [n,V], with whatever bias or soft cap the model has. The softmax is in
    fp32 whatever the type of the logits. With several chunks and gradients, each chunk's logits are made again in the
    backward pass instead of being kept. Non-finite logits give non-finite results; a logit of -inf is a word of
    probability zero. Raises RuntimeError for a target outside the vocabulary.
    """
    assert (hidden.ndim, targets.ndim, len(targets)) == (2, 1, len(hidden))
    rows = max(1, CHUNK_LOGITS // vocabulary)

    def scored(hidden_chunk: Tensor, target_chunk: Tensor) -> tuple[Tensor, Tensor]:
        return _score(head(hidden_chunk), target_chunk, temperature, entropy)

    if hidden.shape[0] <= rows:
        return scored(hidden, targets)
    chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
    if torch.is_grad_enabled():
        # There is no dropout in the head, so no random state to save and put back.
        parts = [checkpoint(scored, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    else:
        parts = [scored(*chunk) for chunk in chunks]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _score(logits: Tensor, targets: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
    return _LogprobAndEntropy.apply(logits, targets, temperature, entropy)


class _LogprobAndEntropy(torch.autograd.Function):
    """logits [n,V], targets [n] -> log p[target] [n], H [n], keeping one [n,V] array for the backward pass.

    ∂ log p_k / ∂ z_j = [j = k] − p_j and ∂ H / ∂ z_j = −p_j (log p_j + H), with z = logits / temperature.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
        precision = torch.promote_types(logits.dtype, torch.float32)
        scaled = logits if temperature == 1 else logits.to(precision) / temperature
        log_p = torch.log_softmax(scaled, dim=-1, dtype=precision)
        logprobs = log_p.gather(-1, targets[:, None]).squeeze(-1)
        if entropy:
            log_p.clamp_(min=torch.finfo(precision).min)  # 0 · log 0 is 0, not NaN; a NaN stays one
            entropies = -(log_p.exp().mul_(log_p)).sum(-1)
        else:
            entropies = torch.zeros_like(logprobs)
            ctx.mark_non_differentiable(entropies)
        ctx.save_for_backward(log_p, entropies, targets)
        ctx.temperature, ctx.entropy, ctx.dtype = temperature, entropy, logits.dtype
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, logprob_gradient: Tensor, entropy_gradient: Tensor) -> tuple[Tensor, None, None, None]:
        log_p, entropies, targets = ctx.saved_tensors
        p = log_p.exp()
        if ctx.entropy:
            slope = (log_p + entropies[:, None]).mul_(-entropy_gradient[:, None]).sub_(logprob_gradient[:, None])
            gradient = p.mul_(slope)
        else:
            gradient = p.mul_(-logprob_gradient[:, None])
        gradient.scatter_add_(-1, targets[:, None], logprob_gradient[:, None])
        return gradient.div_(ctx.temperature).to(ctx.dtype), None, None, None

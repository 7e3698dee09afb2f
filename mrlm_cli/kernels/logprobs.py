"""Log-probabilities and entropies of chosen tokens, without ever holding the logits of all of them.

N scored tokens, H width of the hidden state, V words of the vocabulary. The only arrays of size [., V] are those of one
chunk of at most `CHUNK_LOGITS` logits (`WIDE_CHUNK_LOGITS` on a GPU), a fixed rule: no setting, and no memory that
happens to be free, changes bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from mrlm_cli.kernels import native

# 128 MiB in fp32. Each further chunk costs a pass over the head's whole gradient [V,H], so that small ones are slow.
CHUNK_LOGITS = 2**25
# Elsewhere than on a CPU: 1 GiB in fp32.
WIDE_CHUNK_LOGITS = 2**28
# 2 MiB in fp32.
BLOCK_LOGITS = 2**19


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
    limit = CHUNK_LOGITS if hidden.device.type == "cpu" else WIDE_CHUNK_LOGITS
    rows = max(1, limit // vocabulary)

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
    """logits [n,V], targets [n] -> log p[target] [n], H [n], keeping nothing of size [n,V] but the logits themselves.

    log p_j = z_j − log Σ exp z with z = logits / temperature, H = −Σ p_j log p_j;
    ∂ log p_k / ∂ z_j = [j = k] − p_j and ∂ H / ∂ z_j = −p_j (log p_j + H).
    By the kernels in C where they can be had. Else a few rows at a time go through all the steps, so that what lies
    between two steps stays in the processor's cache.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
        logits, targets = logits.contiguous(), targets.contiguous()
        score = _score_by_torch if native.on(logits) is None else _score_by_kernel
        logprobs, log_total, entropies = score(logits, targets, temperature, entropy)
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        ctx.set_materialize_grads(False)  # no gradient of the entropies is less work than one of zeros
        ctx.save_for_backward(logits, targets, log_total, entropies)
        ctx.temperature = temperature
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, logprob_gradient: Tensor | None, entropy_gradient: Tensor | None
    ) -> tuple[Tensor, None, None, None]:
        logits, targets, log_total, entropies = ctx.saved_tensors
        if logprob_gradient is None:
            logprob_gradient = torch.zeros_like(log_total)
        of_entropy = None if entropy_gradient is None else entropy_gradient.contiguous()
        backward = _score_backward_by_torch if native.on(logits) is None else _score_backward_by_kernel
        gradient = backward(
            logits, targets, ctx.temperature, log_total, entropies, logprob_gradient.contiguous(), of_entropy
        )
        return gradient, None, None, None


def _score_by_torch(
    logits: Tensor, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """log p[target], log Σ exp z and H (zeros unless `entropy`), all [n]."""
    precision = torch.promote_types(logits.dtype, torch.float32)
    logprobs = torch.empty(len(logits), dtype=precision, device=logits.device)
    log_total = torch.empty_like(logprobs)
    entropies = torch.zeros_like(logprobs)
    for rows in _blocks(logits):
        z = _scaled(logits[rows], temperature, precision)
        highest = z.amax(-1, keepdim=True)
        z.sub_(highest)
        chosen = z.gather(-1, targets[rows, None])[:, 0]
        weights = z.exp()
        total = weights.sum(-1)
        logprobs[rows] = chosen - total.log()
        log_total[rows] = highest[:, 0] + total.log()
        if entropy:
            z.clamp_(min=torch.finfo(precision).min)  # 0 · log 0 is 0, not NaN; a NaN stays one
            entropies[rows] = total.log() - weights.mul_(z).sum(-1) / total
    return logprobs, log_total, entropies


def _score_by_kernel(
    logits: Tensor, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    library = native.on(logits)
    assert library is not None
    assert targets.dtype == torch.int64
    # torch's gather refuses a word outside the vocabulary; the kernel reads where it is told.
    if len(targets) and (int(targets.min()) < 0 or int(targets.max()) >= logits.shape[1]):
        raise RuntimeError(f"a target lies outside the vocabulary of {logits.shape[1]} words")
    logprobs = logits.new_empty(len(logits), dtype=torch.float32)
    log_total = torch.empty_like(logprobs)
    entropies = torch.zeros_like(logprobs)
    native.run(
        library.score,
        logits,
        targets,
        temperature,
        logprobs,
        log_total,
        entropies if entropy else None,
        *logits.shape,
        like=logits,
        threads=native.threads(logits.numel()),
    )
    return logprobs, log_total, entropies


def _score_backward_by_torch(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    log_total: Tensor,
    entropies: Tensor,
    of_logprobs: Tensor,
    of_entropies: Tensor | None,
) -> Tensor:
    """The gradient of the logits [n,V], in their type."""
    gradient = torch.empty_like(logits)
    for rows in _blocks(logits):
        of_logprob = of_logprobs[rows, None]
        log_p = _scaled(logits[rows], temperature, log_total.dtype).sub_(log_total[rows, None])
        p = log_p.exp()
        if of_entropies is not None:
            log_p.clamp_(min=torch.finfo(log_p.dtype).min)
            slope = log_p.add_(entropies[rows, None]).mul_(-of_entropies[rows, None]).sub_(of_logprob)
        else:
            slope = -of_logprob
        of_z = p.mul_(slope).scatter_add_(-1, targets[rows, None], of_logprob)
        gradient[rows] = of_z if temperature == 1 else of_z.div_(temperature)
    return gradient


def _score_backward_by_kernel(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    log_total: Tensor,
    entropies: Tensor,
    of_logprobs: Tensor,
    of_entropies: Tensor | None,
) -> Tensor:
    library = native.on(logits)
    assert library is not None
    gradient = torch.empty_like(logits)
    native.run(
        library.score_backward,
        logits,
        targets,
        temperature,
        log_total,
        entropies,
        of_logprobs,
        of_entropies,
        gradient,
        *logits.shape,
        like=logits,
        threads=native.threads(logits.numel()),
    )
    return gradient


def _scaled(logits: Tensor, temperature: float, precision: torch.dtype) -> Tensor:
    """A new tensor: logits / temperature in `precision`."""
    scaled = logits.to(precision, copy=True)
    return scaled if temperature == 1 else scaled.div_(temperature)


def _blocks(logits: Tensor) -> list[slice]:
    """Rows of [n,V] in slices of at most BLOCK_LOGITS logits; all at once where there is no cache to stay in."""
    count = len(logits)
    size = max(1, BLOCK_LOGITS // logits.shape[1]) if logits.device.type == "cpu" else max(1, count)
    return [slice(begin, begin + size) for begin in range(0, count, size)]

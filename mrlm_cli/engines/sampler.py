"""The sampler: one token a row, by inverting the cumulative distribution in two levels."""

from __future__ import annotations

import math

import torch

from mrlm_cli.kernels import native


def sample(
    logits: torch.Tensor,  # [B, V], any float type
    temperature: torch.Tensor,  # [B] fp32; a row at 0 is greedy and its log-prob is that at temperature 1
    uniforms: torch.Tensor,  # [B, 2] float64 in [0, 1): block of the vocabulary, word in the block
    *,
    scaled: bool | None = None,
    drawn: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B] int64 and their log-probs [B] fp32 under softmax(logits.float() / temperature).

    The vocabulary is cut into blocks of about sqrt(V) words; the first uniform picks a block by its mass, the second a
    word inside it (Devroye 1986, "Non-Uniform Random Variate Generation", III.2). Sums are float64 and scaled by their
    own total, and a word whose fp32 probability is zero is never picked. A row that holds NaN or +inf, or nothing
    above -inf, gets the log-prob NaN: the caller knows whose row it is and raises.

    `scaled` and `drawn` say whether any temperature is not 1 and whether any is above 0, so that work is left out; True
    is always right, to the bit. By default the temperatures are looked at, for which the host waits on the device.
    """
    assert logits.ndim == 2, logits.shape
    rows, words = logits.shape
    if (library := native.on(logits, temperature)) and temperature.dtype == torch.float32:
        return _by_kernel(library, logits.contiguous(), temperature.contiguous(), uniforms.contiguous())
    greedy = temperature == 0
    scaled = bool((temperature != 1).any()) if scaled is None else scaled
    drawn = not bool(greedy.all()) if drawn is None else drawn
    divided = logits.float()
    if scaled:
        divided = divided / torch.where(greedy, torch.ones_like(temperature), temperature)[:, None]
    highest, best = divided.max(dim=-1)

    size = _block_size(words)
    blocks = -(-words // size)
    mass = divided.new_zeros(rows, blocks * size)  # the tail of the last block stays at zero
    torch.sub(divided, highest[:, None], out=mass[:, :words]).exp_()
    mass = mass.view(rows, blocks, size)
    block_mass = mass.sum(dim=-1, dtype=torch.float64)  # [B, blocks]
    total = block_mass.sum(dim=-1)

    tokens = best
    if drawn:
        block = _invert(block_mass, uniforms[:, 0])
        inside = mass[torch.arange(rows, device=mass.device), block].double()  # [B, size]
        tokens = block * size + _invert(inside, uniforms[:, 1])
        tokens = torch.where(greedy, best, tokens)
    tokens = tokens.clamp_(max=words - 1)  # a row of NaN picks nothing; its index must still be one
    chosen = divided.gather(1, tokens[:, None])[:, 0]
    return tokens, ((chosen - highest).double() - total.log()).float()


def _by_kernel(
    library: native.Library, logits: torch.Tensor, temperature: torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    assert uniforms.dtype == torch.float64
    rows, words = logits.shape
    size, threads = _block_size(words), min(rows, native.threads(logits.numel()))
    tokens = torch.empty(rows, dtype=torch.int64)
    logprobs = torch.empty(rows, dtype=torch.float32)
    masses = torch.empty(threads, size, dtype=torch.float64)  # no more blocks than words in a block
    native.run(
        library.draw,
        logits,
        temperature,
        uniforms,
        tokens,
        logprobs,
        masses,
        rows,
        words,
        size,
        like=logits,
        threads=threads,
    )
    return tokens, logprobs


def _block_size(words: int) -> int:
    return math.isqrt(words - 1) + 1


def _invert(mass: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """First index of positive mass whose cumulative mass exceeds uniform x total.  [B,N] float64, [B] -> [B]."""
    positive = mass > 0
    # A parallel scan need not be monotone: entries without mass are taken out, the total is the scan's own maximum.
    cumulative = torch.where(positive, mass.cumsum(dim=-1), 0.0)
    target = uniform * cumulative.amax(dim=-1)
    return (cumulative > target[:, None]).to(torch.uint8).argmax(dim=-1)

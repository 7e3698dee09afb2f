"""The decode step: one token for each of the first slots.

What it takes and what it gives is one small tensor each, so that a step is one copy to the device, one function without
a look from the host, and one copy back.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from mrlm_cli.engines.cached.cache import SlotCache
from mrlm_cli.engines.cached.forward import Forward, extend
from mrlm_cli.engines.cached.slots import Conversation
from mrlm_cli.engines.sampler import sample

TAKEN = 5  # numbers of a row that a step takes: token, position, temperature, two uniforms; float64 holds each exactly


def taken(live: Sequence[Conversation], idle: Sequence[int]) -> Tensor:
    """What the next step takes [live + idle, TAKEN] float64, on the host.

    Idle rows follow the live ones to fill a shape: they feed token 0 at the given positions, and choose greedily.
    """
    numbers = array("d")
    for row in live:
        draft = row.draft
        assert draft is not None
        numbers.extend((draft.tokens[-1], row.fed, draft.request.limits.temperature, *draft.draw()))
    for position in idle:
        numbers.extend((0, position, 0.0, 0.0, 0.0))
    return torch.frombuffer(numbers, dtype=torch.float64).view(-1, TAKEN)


def step(
    forward: Forward,
    cache: SlotCache,
    given: Tensor,  # float64 [B, TAKEN]
    width: int,  # attention reads so many positions of each slot
    *,
    scaled: bool,  # whether any temperature is not 1
    drawn: bool,  # whether any temperature is above 0
) -> Tensor:
    """Feed a token to each of the slots 0 to B - 1 and choose the next: [B, 2] float64, tokens and log-probs.

    Doing it again with the same `given` writes and returns the same.
    """
    tokens, positions = given[:, :2].long().unbind(1)
    logits = extend(forward, cache, None, tokens[:, None], positions, None, width, fresh=False)
    chosen, logprobs = sample(logits, given[:, 2].float(), given[:, 3:], scaled=scaled, drawn=drawn)
    return torch.stack([chosen.double(), logprobs.double()], dim=1)

"""Keys and values of many conversations in preallocated slots, as a transformers Cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache


@dataclass(frozen=True, slots=True)
class Write:
    """Where one forward of B rows and Q tokens puts its keys and values, and what it attends to."""

    slots: torch.Tensor | None  # int64 [B]; None: slots 0 to B - 1, which need no gathering
    fresh: bool  # nothing lies before these tokens: attention is over the new keys alone
    width: int  # attention reads the first `width` positions of each slot (not used when fresh)
    at_slots: torch.Tensor  # int64 [N]: slot of every real token
    at_positions: torch.Tensor  # int64 [N]
    real: torch.Tensor | None  # int64 [N]: indices of the real tokens in the flat [B x Q]; None: all are real


class SlotCache(Cache):
    """For each layer, keys and values [slots, heads, capacity, width of a head], made when the layer first writes.

    Memory is layers x 2 x slots x capacity x heads x width numbers. What lies behind a slot's length is finite
    leftovers; masks hide it.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        super().__init__(layers=[])
        self.slots = slots
        self.capacity = capacity
        self.write: Write | None = None  # set for the forward that is running
        self._pools: list[list[torch.Tensor]] = []  # [layer][key or value]

    def update(  # the name and arguments are transformers'
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values [B, heads, Q, width] and return all that the layer attends to."""
        while len(self._pools) <= layer_idx:
            self._pools.append([])
        pools = self._pools[layer_idx]
        if not pools:
            for states in (key_states, value_states):
                pools.append(states.new_zeros(self.slots, states.shape[1], self.capacity, states.shape[3]))
        return self._put(pools[0], key_states), self._put(pools[1], value_states)

    def _put(self, pool: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        write = self.write
        assert write is not None
        flat = (
            states[:, :, 0] if states.shape[2] == 1 else states.transpose(1, 2).flatten(0, 1)
        )  # [B x Q, heads, width]
        pool[write.at_slots, :, write.at_positions] = flat if write.real is None else flat[write.real]
        if write.fresh:
            return states
        seen = pool[:, :, : write.width]
        return seen[: len(states)] if write.slots is None else seen[write.slots]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: rows differ in length, so positions and masks are always given explicitly."""
        return 0

    def pools(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [slots, heads, capacity, width] of a layer that has written."""
        keys, values = self._pools[layer]
        return keys, values

    @property
    def memory(self) -> list[torch.Tensor]:
        """Every pool, once layers have written."""
        return [pool for pools in self._pools for pool in pools]

    def copy(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """targets[i] gets the first `length` positions that sources[i] had before the call."""
        if not sources or not self._pools:
            return
        device = self._pools[0][0].device
        from_slots, to_slots = torch.tensor(sources, device=device), torch.tensor(targets, device=device)
        for pools in self._pools:
            for pool in pools:
                seen = pool[:, :, :length]
                seen[to_slots] = seen[from_slots]

    def resize(self, slots: int, capacity: int, sources: Sequence[int], length: int) -> None:
        """New pools in which slot i holds the first `length` positions of the old slot sources[i]."""
        self.slots, self.capacity = slots, capacity
        for pools in self._pools:
            for index, old in enumerate(pools):
                new = old.new_zeros(slots, old.shape[1], capacity, old.shape[3])
                new[: len(sources), :, :length] = old[list(sources), :, :length]
                pools[index] = new

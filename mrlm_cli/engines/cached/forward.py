"""One forward over slots: positions, masks, and logits at the last real token of every row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from mrlm_cli.engines.cached.cache import SlotCache, Write
from mrlm_cli.engines.weights import Weights
from mrlm_cli.errors import EngineError


class Forward(Protocol):
    """A model that appends tokens to slots."""

    @property
    def module(self) -> Any:
        """The transformers module whose weights it runs with."""

    def refresh(self) -> None:
        """Take the present weights of the module that it was made for."""

    def release(self) -> None:
        """Give up whatever `refresh` makes anew."""

    def run(
        self,
        cache: SlotCache,
        write: Write,
        tokens: torch.Tensor,  # int64 [B, Q], padded on the right
        positions: torch.Tensor,  # int64 [B, Q]; padding repeats the last real position
        last: torch.Tensor | None,  # int64 [B]: the place of each row whose logits are wanted; None: Q is 1
    ) -> torch.Tensor:
        """Append tokens to slots as `write` says; logits [B, V]."""


def extend(
    forward: Forward,
    cache: SlotCache,
    slots: torch.Tensor | None,  # int64 [B]; None: slots 0 to B - 1
    tokens: torch.Tensor,  # int64 [B, Q], padded on the right
    starts: torch.Tensor,  # int64 [B]: positions already in each slot
    counts: torch.Tensor | None,  # int64 [B]: real tokens of each row; None: all Q
    width: int,  # attention reads so many positions, no fewer than the largest start + count (not used when fresh)
    fresh: bool,  # every start is 0
) -> torch.Tensor:
    """Append tokens to slots; logits [B, V] after the last real token of each row."""
    rows, queries = tokens.shape
    device = tokens.device
    steps = torch.arange(queries, device=device)[None]  # [1, Q]
    # Padding repeats the last real position, so that it stays inside tables of learnt positions.
    offsets = steps.expand(rows, -1) if counts is None else torch.minimum(steps, counts[:, None] - 1)
    positions = starts[:, None] + offsets  # [B, Q]
    of_rows = torch.arange(rows, device=device) if slots is None else slots
    real = None if counts is None else (steps < counts[:, None]).flatten().nonzero()[:, 0]
    at_slots, at_positions = of_rows[:, None].expand(-1, queries).flatten(), positions.flatten()
    if real is not None:
        at_slots, at_positions = at_slots[real], at_positions[real]
    write = Write(slots, fresh, queries if fresh else width, at_slots, at_positions, real)
    last = None if queries == 1 else (offsets[:, -1] if counts is None else counts - 1)
    return forward.run(cache, write, tokens, positions, last)


class AnyForward:
    """Drives an unmodified transformers causal LM.

    Raises EngineError for families whose layers keep more than keys and values, or that need another attention.
    """

    def __init__(self, module: torch.nn.Module, precision: str) -> None:
        config: Any = module.config
        if config._attn_implementation not in ("sdpa", "eager"):
            raise EngineError(
                f"the cached engine needs attention sdpa or eager, not {config._attn_implementation}; "
                "load the model with one of these or use engine.type generate"
            )
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        if kinds is None:
            kinds = ["full_attention" if window is None else "sliding_attention"]
        unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        if unknown:
            raise EngineError(
                f"the cached engine cannot decode {config.model_type}: it has layers of type {', '.join(unknown)}; "
                "use engine.type generate"
            )
        self._windows: dict[str, int | None] = {
            kind: window if kind == "sliding_attention" else None for kind in sorted(set(kinds))
        }
        self._source = module
        self._weights = Weights(precision)
        self.refresh()

    @property
    def module(self) -> Any:
        """The module that decodes: the given one in float32, a copy in bfloat16."""
        return self._weights.module

    def refresh(self) -> None:
        """Take the present weights."""
        self._weights.load(self._source)

    def release(self) -> None:
        """Give up the copy of the weights, if there is one."""
        self._weights.release()

    def run(
        self,
        cache: SlotCache,
        write: Write,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        last: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `Forward`."""
        cache.write = write
        with self._head_at(last):
            out = self.module(
                input_ids=tokens,
                attention_mask=self._masks(positions, write.width),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
        cache.write = None
        logits: torch.Tensor = out.logits[:, 0]
        return logits

    def _masks(self, positions: torch.Tensor, width: int) -> Any:
        """Additive masks [B, 1, Q, width]: a tensor, or one for each kind of layer where a model has several."""
        keys = torch.arange(width, device=positions.device)
        dtype = self.module.get_input_embeddings().weight.dtype
        masks = {}
        for kind, window in self._windows.items():
            seen = keys <= positions[:, None, :, None]
            if window is not None:
                seen &= keys > positions[:, None, :, None] - window
            masks[kind] = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
        return masks if len(masks) > 1 else masks.popitem()[1]

    @contextmanager
    def _head_at(self, last: torch.Tensor | None) -> Iterator[None]:
        """Inside, the LM head runs at position last[b] of each row only; None leaves it alone.

        Narrowing the head's input keeps whatever a family does to its logits afterwards (scaling, soft caps).
        """
        if last is None:
            yield
            return
        every = torch.arange(len(last), device=last.device)
        hook = self.module.get_output_embeddings().register_forward_pre_hook(
            lambda _, inputs: (inputs[0][every, last][:, None],)
        )
        try:
            yield
        finally:
            hook.remove()

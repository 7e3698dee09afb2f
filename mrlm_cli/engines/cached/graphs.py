"""Decode steps as CUDA graphs: each shape is captured once and then replayed by one call.

A graph is a list of kernels with the addresses that they read and write. So it takes and gives its numbers in tensors
of its own, and holds only while weights and cache lie where they lay; once one has moved, all are captured anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mrlm_cli.engines.cached.cache import SlotCache
from mrlm_cli.engines.cached.forward import Forward
from mrlm_cli.engines.cached.steps import step
from mrlm_cli.errors import EngineError

WARM_UP = 3  # calls before a capture, in which libraries make what they keep


class Capture(Protocol):
    """Makes replays of one family, which share memory for what they compute in between."""

    def __call__(self, work: Callable[[], None]) -> Callable[[], object]:
        """Record what `work` does on the device; returns what does it again, on the same tensors.

        `work` may run any number of times meanwhile, or not at all.
        """


class CudaCaptures:
    """Begins families of captures by torch.cuda.graph, one after another, all on one stream of their own.

    Libraries and the allocator keep memory for every stream that they once saw, and when a graph ends torch gives up
    cuBLAS's of its stream, whichever other graphs still use it. So neither each family has a stream, nor all engines
    share one: whoever has this gives up a family as a whole before it begins the next.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None  # made where CUDA is known to be there

    def __call__(self) -> CudaCapture:
        """A new family."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        return CudaCapture(self._stream)


class CudaCapture:
    """Capture by torch.cuda.graph. Raises EngineError where a step cannot be captured."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], None]) -> Callable[[], object]:
        """See `Capture`."""
        graph, here, aside = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), self._stream
        aside.wait_stream(here)
        with torch.cuda.stream(aside):  # also to come back from, which a capture that fails does not by itself
            for _ in range(WARM_UP):
                work()
            try:
                # Whatever another thread does on the device meanwhile is not part of it, and is no error.
                with torch.cuda.graph(graph, pool=self._pool, stream=aside, capture_error_mode="thread_local"):
                    work()
            except RuntimeError as error:
                raise EngineError(
                    f"engine.cuda_graphs: the step could not be captured ({_reason(error)}); set it to false"
                ) from error
        here.wait_stream(aside)
        return graph.replay


def _reason(error: BaseException) -> str:
    """What went wrong first: the end of a capture that failed raises too, and says less."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).partition("\n")[0] or type(error).__name__


@dataclass(frozen=True, slots=True)
class _Captured:
    given: Tensor
    chosen: Tensor
    replay: Callable[[], object]


class Graphs:
    """Decode steps by (rows, attention width). `family` begins a new family of captures."""

    def __init__(self, family: Callable[[], Capture]) -> None:
        self._family = family
        self._held: dict[tuple[int, int], _Captured] = {}
        self._capture: Capture | None = None
        self._memory: object = None

    def lies(self, memory: Iterable[Tensor]) -> None:
        """Say where weights and cache lie now; graphs over other places are dropped. Comes before `step`."""
        places = [(tensor.data_ptr(), tensor.shape, tensor.dtype) for tensor in memory]
        if self._capture is None or places != self._memory:
            self.drop()
            self._capture, self._memory = self._family(), places

    def drop(self) -> None:
        """Forget every graph: another model computes otherwise, even over the same places."""
        self._held.clear()
        self._capture = self._memory = None

    def step(self, forward: Forward, cache: SlotCache, given: Tensor, width: int) -> Tensor:
        """See `steps.step`; `given` is on the host. What is returned holds until the next call."""
        assert self._capture is not None
        held = self._held.get((len(given), width))
        if held is None:
            held = self._held[len(given), width] = self._captured(self._capture, forward, cache, given, width)
        else:
            held.given.copy_(given)
        held.replay()
        return held.chosen

    def _captured(self, capture: Capture, forward: Forward, cache: SlotCache, given: Tensor, width: int) -> _Captured:
        there = given.to(cache.memory[0].device, copy=True)
        chosen = there.new_zeros(len(given), 2)

        def work() -> None:
            chosen.copy_(step(forward, cache, there, width, scaled=True, drawn=True))

        return _Captured(there, chosen, capture(work))

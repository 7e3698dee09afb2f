"""The weights an engine decodes with: the trainer's own in float32, one refreshed copy in bfloat16."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mrlm_cli.errors import EngineError


class Weights:
    """A module ready to decode. float32 shares the given module; bfloat16 keeps one copy that `load` refreshes.

    In the copy every parameter is bfloat16, tied ones stay tied, and buffers (rotary frequencies) stay as they are;
    transformers computes norms, rotary angles and softmax in float32 inside.
    """

    def __init__(self, precision: str) -> None:
        if precision not in ("float32", "bfloat16"):
            raise EngineError(f"precision {precision!r} is neither float32 nor bfloat16")
        self._copies = precision == "bfloat16"
        self._source: torch.nn.Module | None = None
        self._module: torch.nn.Module | None = None

    @torch.no_grad()
    def load(self, module: torch.nn.Module) -> None:
        """Take the weights of `module`."""
        if not self._copies:
            self._module = module
        elif module is self._source and self._module is not None:
            for mine, theirs in zip(self._module.parameters(), module.parameters(), strict=True):
                mine.copy_(theirs)
        else:
            memo: dict[int, object] = {
                id(parameter): torch.nn.Parameter(parameter.detach().to(torch.bfloat16), requires_grad=False)
                for parameter in module.parameters()
            }
            self._module = copy.deepcopy(module, memo)
        self._source = module

    def release(self) -> None:
        """Have no module until the next load; a copy is given up."""
        self._module = None

    @property
    def module(self) -> torch.nn.Module:
        """The module to decode with. Raises EngineError before the first load."""
        if self._module is None:
            raise EngineError("the engine has no weights yet: load a policy first")
        return self._module


@contextmanager
def decoding(module: torch.nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside; the module's own training flags come back afterwards.

    no_grad rather than inference_mode: a buffer that a forward replaces stays usable in training.
    """
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True

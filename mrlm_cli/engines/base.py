"""What an engine is: requests in, completions out, on a plain module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from mrlm_cli.records import Completion, Request
from mrlm_cli.strict import EngineSettings as EngineSettings

if TYPE_CHECKING:
    import torch


class Engine(Protocol):
    """Decodes for one policy. Completions come in the order of the requests.

    Constructed as `Class(config, *, decode, precision, check)`: `decode(token_ids) -> str` is the tokenizer's, for
    stop strings; `precision` is "float32" or "bfloat16"; `check()` is called between decode steps and may raise, so
    that a signal is seen inside a long rollout.
    """

    def __init__(
        self, config: Any, *, decode: Callable[[Sequence[int]], str], precision: str, check: Callable[[], None]
    ) -> None: ...

    def load(self, module: torch.nn.Module) -> None:
        """Take the weights of a plain transformers causal LM (shared or copied) and drop every cache."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion for each request, a function of weights and requests alone. Raises EngineError."""

    def free(self, conversations: Iterable[str]) -> None:
        """Forget what is cached for these conversations; unknown names are ignored."""

    def release(self) -> None:
        """Give up copies of weights and every cache until the next `load`, which comes before the next `generate`.

        Called before an update, which needs the memory.
        """

"""The engine that trains: batched decoding over preallocated keys and values, on an unmodified transformers module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from mrlm_cli.engines.base import EngineSettings
from mrlm_cli.errors import UserError
from mrlm_cli.records import Completion, Request

if TYPE_CHECKING:
    import torch


class CachedEngine:
    """Batched decoding over preallocated keys and values: the default.

    Prompts of different lengths decode together without padding between them; equal prompts are computed once.
    Rows that end are retired and their places refilled in the order of the requests. A conversation keeps its keys
    and values until `free` or `load`, so that its next turn feeds only what is new. Completions are a function of
    weights, settings and the calls since the last load; across batch compositions they agree up to float rounding.
    """

    class Config(EngineSettings):
        """How much decodes together."""

        type: str = "cached"
        """Name of the engine."""
        slots: Annotated[int, Field(ge=1, le=1_000_000)] = 512
        """Rows that decode together at most; further requests take the place of rows that end."""
        max_cached_tokens: Annotated[int, Field(ge=1, le=1_000_000_000)] = 65536
        """Token positions that keys and values are held for at most; what does not fit waits or is computed anew."""
        cuda_graphs: bool = False
        """Capture decode steps as CUDA graphs and replay them: on a GPU, with models of Llama's shape, a step is then
        one launch; weights and cache keep their memory during updates. Off by default: it has not run on a GPU yet."""

    def __init__(
        self, config: Config, *, decode: Callable[[Sequence[int]], str], precision: str, check: Callable[[], None]
    ) -> None:
        from mrlm_cli.engines.cached.decoder import Decoder
        from mrlm_cli.engines.cached.graphs import CudaCaptures

        self.config = config
        self._decode = decode
        capture = CudaCaptures() if config.cuda_graphs else None
        self._decoder = Decoder(config.slots, config.max_cached_tokens, precision, check, capture)

    def load(self, module: torch.nn.Module) -> None:
        """Take the weights of a plain transformers causal LM (float32 shares them, bfloat16 copies); drop every cache.

        Raises EngineError for a family whose layers keep more than keys and values, UserError where engine.cuda_graphs
        is true for a policy that is not on a GPU or not of Llama's shape.
        """
        device = next(module.parameters()).device.type
        if self.config.cuda_graphs and device != "cuda":
            raise UserError(f"engine.cuda_graphs is true, and the policy is on {device}; set it to false")
        self._decoder.load(module)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion for each request, in their order.

        Raises EngineError for tokens that do not extend their conversation, requests that do not fit the model's
        context, and logits that are not finite; then nothing is cached any more.
        """
        return self._decoder.generate(requests, self._decode)

    def free(self, conversations: Iterable[str]) -> None:
        """Forget these conversations; unknown names are ignored."""
        self._decoder.free(conversations)

    def release(self) -> None:
        """Give up copies of weights, keys and values until the next load; with cuda_graphs their memory is kept."""
        self._decoder.release()

"""The reference engine: transformers' own generate, one request at a time, with our sampler. Slow and obvious."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from mrlm_cli.engines.base import EngineSettings
from mrlm_cli.engines.drafts import Draft, check_requests
from mrlm_cli.records import Completion, Request

if TYPE_CHECKING:
    import torch


class GenerateEngine:
    """transformers' generate with our sampler's rule: slow and obvious, the reference for the cached engine.

    Runs `module.generate` once for each request; every token is chosen by the sampler from the module's own logits.

    It holds no cache between calls, only the tokens of each conversation, so that it refuses what a caching engine
    would refuse.
    """

    class Config(EngineSettings):
        """No further settings."""

        type: str = "generate"
        """Name of the engine."""

    def __init__(
        self, config: Config, *, decode: Callable[[Sequence[int]], str], precision: str, check: Callable[[], None]
    ) -> None:
        from mrlm_cli.engines.weights import Weights

        self.config = config
        self._decode = decode
        self._check = check
        self._weights = Weights(precision)
        self._held: dict[str, tuple[int, ...]] = {}

    def load(self, module: torch.nn.Module) -> None:
        """Take the weights of a plain transformers causal LM and forget every conversation."""
        self._held.clear()
        self._weights.load(module)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion for each request, in their order. Raises EngineError."""
        module: Any = self._weights.module
        check_requests(requests, self._held, getattr(module.config, "max_position_embeddings", None))
        drafts = [self._complete(module, Draft(request, self._decode)) for request in requests]
        for draft in drafts:
            self._held[draft.request.conversation] = draft.request.tokens + tuple(draft.tokens)
        return [draft.completion() for draft in drafts]

    def free(self, conversations: Iterable[str]) -> None:
        """Forget these conversations; unknown names are ignored."""
        for name in conversations:
            self._held.pop(name, None)

    def release(self) -> None:
        """Give up the copy of the weights and every conversation until the next load."""
        self._held.clear()
        self._weights.release()

    def _complete(self, module: Any, draft: Draft) -> Draft:
        import torch
        from transformers import GenerationConfig

        from mrlm_cli.engines.sampler import sample
        from mrlm_cli.engines.weights import decoding

        def choose(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            self._check()
            temperature = torch.tensor([draft.request.limits.temperature], dtype=torch.float32, device=logits.device)
            drawn = torch.tensor([draft.draw()], dtype=torch.float64, device=logits.device)
            tokens, logprobs = sample(logits, temperature, drawn)
            draft.add(int(tokens[0]), float(logprobs[0]))
            return torch.full_like(logits, -torch.inf).scatter_(1, tokens[:, None], 0.0)

        def stopped(tokens: torch.Tensor, _: Any) -> torch.Tensor:
            return torch.full((len(tokens),), draft.stop is not None, device=tokens.device)

        device = next(module.parameters()).device
        tokens = torch.tensor([draft.request.tokens], device=device)
        kept = module.generation_config
        # A checkpoint's own generation settings (top-k, penalties, end tokens) would change the logits or the end.
        module.generation_config = GenerationConfig(pad_token_id=0)
        try:
            with decoding(module):
                module.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    do_sample=False,
                    max_new_tokens=draft.request.limits.max_new_tokens,
                    logits_processor=[choose],
                    stopping_criteria=[stopped],
                )
        finally:
            module.generation_config = kept
        return draft

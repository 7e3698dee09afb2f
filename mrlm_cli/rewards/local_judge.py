"""A frozen language model on this machine as judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from mrlm_cli import registry
from mrlm_cli.records import Limits, Message, Request, Transcript
from mrlm_cli.rewards.base import Failure, ModelSettings, Outcome, Reward, said
from mrlm_cli.rewards.judge import JudgeSettings, rating, shown
from mrlm_cli.strict import Names

if TYPE_CHECKING:
    from mrlm_cli.engines.base import Engine
    from mrlm_cli.policy.chat import Chat


class LocalJudge(Reward):
    """Ask a model that never moves to rate a session, and take the number that it replies.

    It has an engine and a chat template of its own, answers greedily, and sees sessions one by one, so that a rating
    depends on its session alone: a resume repeats it. The session is shown between two marks, told to be data. Every
    agent that said something is rated by its own view. Every worker process loads a copy (hardware.worker_processes).
    A session that does not fit the judge's context fails, and so does one whose rating cannot be read.
    """

    class Config(JudgeSettings, ModelSettings):
        """Which model, and where it runs."""

        path: Annotated[str, Field(min_length=1), Names("model")]
        """A model's, run's or checkpoint's directory, a `.gguf` file or a hub id; that of model.path is the reference,
        the policy as it started."""
        max_new_tokens: Annotated[int, Field(ge=1, le=100_000)] = 16
        """Tokens that the judge may write."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._engine: Engine | None = None
        self._chat: Chat | None = None

    def prepare(self) -> None:
        """Load the model. Raises UserError, CheckpointError, MissingExtra."""
        import torch

        from mrlm_cli.policy import load
        from mrlm_cli.recipe.sections import PretrainedModel

        torch.set_num_threads(self.config.threads)
        policy, self._chat = load.build(
            PretrainedModel(type="pretrained", path=self.config.path),
            seed=0,
            device=self.config.device,
            precision=self.config.precision,
            gradient_checkpointing=False,
            values=False,
        )
        kind = registry.resolve("engines", "cached")
        self._engine = kind(
            kind.Config(), decode=self._chat.decode, precision=self.config.precision, check=lambda: None
        )
        self._engine.load(policy.requires_grad_(False).lm)

    def fingerprint(self) -> str | None:
        """A hash of the model's files; None for a hub id. Raises CheckpointError."""
        from mrlm_cli.policy.pretrained import fingerprint

        return fingerprint(self.config.path)

    def score(self, transcripts: Sequence[Transcript]) -> list[Outcome]:
        """Each agent's rating."""
        return [self._rate(one) for one in transcripts]

    def _rate(self, transcript: Transcript) -> Outcome:
        ratings: dict[str, float] = {}
        for agent in transcript.views:
            if not said(transcript, agent):
                continue
            found = self._ask(shown(transcript, agent))
            if isinstance(found, Failure):
                return found
            ratings[agent] = found
        return ratings

    def _ask(self, conversation: str) -> float | Failure:
        assert self._engine is not None, "prepare comes before score"
        assert self._chat is not None
        messages = (Message("system", self.config.instruction), Message("user", conversation))
        prompt = tuple(token for _, tokens in self._chat.open(messages) for token in tokens)
        room = self._chat.context - len(prompt)
        if room < 1:
            return Failure(f"the session is longer than the judge can see ({self._chat.context} tokens)")
        limits = Limits(
            max_new_tokens=min(self.config.max_new_tokens, room), temperature=0.0, end_tokens=self._chat.end_tokens
        )
        (completion,) = self._engine.generate([Request("judge", prompt, b"greedy", limits)])
        self._engine.free(["judge"])
        return rating(self.config.pattern, self._chat.read(completion.tokens, completion.stop).content)

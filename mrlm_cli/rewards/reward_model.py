"""A trained reward model as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from mrlm_cli.errors import UserError
from mrlm_cli.records import Transcript
from mrlm_cli.rewards.base import Failure, ModelSettings, Outcome, Reward, said
from mrlm_cli.strict import Names

if TYPE_CHECKING:
    from mrlm_cli.policy.scorer import Scorer


class RewardModel(Reward):
    """What a run of algorithm reward_model thinks of the session, after each agent's last reply.

    Sessions are scored one by one, so that a score never depends on its neighbours. Every worker process loads a copy
    of its own (hardware.worker_processes). A session that is longer than the model's context fails.
    """

    class Config(ModelSettings):
        """Which model, and where it runs."""

        path: Annotated[str, Field(min_length=1), Names("reward model")]
        """A run of algorithm reward_model, or one of its checkpoints."""
        low: Annotated[float, Field(ge=-1e6, le=1e6)] = -100.0
        """The least score that is sound; a session with one below counts as failed."""
        high: Annotated[float, Field(ge=-1e6, le=1e6)] = 100.0
        """The greatest score that is sound; a session with one above counts as failed."""
        deadline: Annotated[float, Field(gt=0, le=86_400)] = 60.0
        """Seconds for one session; loading the model does not count."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._scorer: Scorer | None = None
        if not Path(config.path).expanduser().is_dir():
            raise UserError(f"there is no reward model {config.path}; expected a run of algorithm reward_model")

    def prepare(self) -> None:
        """Load the model. Raises UserError, CheckpointError."""
        import torch

        from mrlm_cli.policy.scorer import Scorer

        torch.set_num_threads(self.config.threads)
        self._scorer = Scorer(self.config.path, device=self.config.device, precision=self.config.precision)

    def fingerprint(self) -> str:
        """A hash of the checkpoint's recipe, tokenizer and weights. Raises CheckpointError."""
        from mrlm_cli.policy.scorer import fingerprint

        return fingerprint(self.config.path)

    def score(self, transcripts: Sequence[Transcript]) -> list[Outcome]:
        """The score of every agent that said something."""
        return [self._rate(one) for one in transcripts]

    def _rate(self, one: Transcript) -> Outcome:
        assert self._scorer is not None, "prepare comes before score"
        try:
            return {agent: self._scorer.score([one], agent)[0] for agent in one.views if said(one, agent)}
        except UserError as error:  # it is too long for the model
            return Failure(str(error))

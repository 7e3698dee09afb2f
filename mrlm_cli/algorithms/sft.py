"""Supervised fine-tuning: maximum likelihood of the replies, and perhaps of what the environment answers.

    L = Σ_t w_t · (−log π(token_t | tokens before it)) / Σ_t w_t      w: reply_weight or observation_weight

Ouyang et al. 2022, "Training language models to follow instructions with human feedback", Section 3.5; on stored
episodes it is behavioural cloning (Pomerleau 1991); with an observation weight the policy is a world model as well, as
in Zhang et al. 2025, "Agent Learning via Early Experience", Section 4.1. Left out: loss on prompts and on what the chat
template adds, and a penalty on the distance from the start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from mrlm_cli.algorithms.base import AlgorithmSettings, Needs, Plain
from mrlm_cli.metrics import Sums
from mrlm_cli.records import Batch, PolicyOut, Progress

if TYPE_CHECKING:
    from torch import Tensor

Weight = Annotated[float, Field(ge=0, le=1000)]


class SFT(Plain):
    """Supervised fine-tuning: the likelihood of replies, and of observations where they have a weight."""

    class Config(AlgorithmSettings):
        """Supervised fine-tuning."""

        sources: ClassVar[tuple[Literal["rollouts", "data"], ...]] = ("data",)

        reply_weight: Weight = 1.0
        """Weight of each token of the assistant's replies, their end tokens included."""
        observation_weight: Weight = 0.0
        """Weight of each token that comes between replies (user, tool); above 0 the model learns to foretell them."""
        aggregation: Literal["token", "sequence"] = "token"
        """Every token of the step alike, or every row alike whatever its length."""

        @model_validator(mode="after")
        def _fits(self) -> SFT.Config:
            if self.reply_weight == 0 and self.observation_weight == 0:
                raise ValueError("reply_weight and observation_weight are both 0: nothing would be learnt")
            return self

    def __init__(self, config: Config) -> None:
        self.config = config
        self.needs = Needs(
            values=False, reference=False, old=False, entropy=False, observed=config.observation_weight > 0
        )
        self.bootstrap = False

    def credit(self, batch: Batch, progress: Progress) -> tuple[Batch, Sums]:
        """Weights of replies and observations; mass is their sum, or 1 a row. Rows without weight have no mass."""
        weights = self.config.reply_weight * batch.mask.to(batch.rewards.dtype)
        if batch.observed is not None:
            weights = weights + self.config.observation_weight * batch.observed.to(weights.dtype)
        mass = weights.sum(1)
        if self.config.aggregation == "sequence":
            some = mass > 0
            weights = weights / mass.masked_fill(~some, 1)[:, None]
            mass = some.to(weights.dtype)
        return batch.replace(weights=weights, mass=mass), Sums()

    def loss(self, out: PolicyOut, batch: Batch, progress: Progress) -> tuple[dict[str, Tensor], Sums]:
        """mass: Σ weights · (−log π). Nothing is divided by the number of tokens."""
        weighted = -(batch.weights * _only(out.logprobs, batch.weights > 0)).sum()
        sums = Sums()
        sums.add("loss", weighted.detach(), batch.mass.sum())
        for name, where in self._kinds(batch).items():
            sums.add(name, -_only(out.logprobs.detach(), where).sum(), where.sum())
        return {"mass": weighted, "tokens": weighted.new_zeros(())}, sums

    def judge(self, out: PolicyOut, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """The loss and its parts, of each row."""
        weighted = -(batch.weights * _only(out.logprobs, batch.weights > 0)).double().sum(1)
        found = {"loss": (weighted, batch.mass.double())}
        for name, where in self._kinds(batch).items():
            found[name] = (-_only(out.logprobs, where).double().sum(1), where.sum(1))
        return found

    def _kinds(self, batch: Batch) -> dict[str, Tensor]:
        """name -> bool [B,T] of the tokens it is about; one of a single kind would repeat the loss."""
        return {} if batch.observed is None else {"reply_loss": batch.mask, "observation_loss": batch.observed}


def _only(x: Tensor, where: Tensor) -> Tensor:
    return x.masked_fill(~where, 0)  # 0 · NaN would be NaN, also in the gradient

"""Direct preference optimization: the policy itself is the reward model, pairs of answers the data.

Rafailov et al. 2023, "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", Eq. 7; IPO: Azar
et al. 2023, Eq. 17; hinge: Zhao et al. 2023, "SLiC-HF"; label smoothing: Mitchell 2023, not corrected for its bias as
TRL's `robust` is. On data, pairs are rows; on environments, the best and the worst of the episodes of a task, freshly
sampled (Guo et al. 2024, "Direct Language Model Alignment from Online AI Feedback"). Left out: a term that keeps the
likelihood of the preferred answer up, and weights of pairs. IPO's paper sums log-probabilities; its authors later
divided by the length, as TRL always does: that is `length_normalised`, off unless asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from mrlm_cli import formulas
from mrlm_cli.algorithms.base import AlgorithmSettings, Needs, Plain
from mrlm_cli.algorithms.pairs import judged, measured, pairs, weighed
from mrlm_cli.metrics import Sums
from mrlm_cli.records import Batch, PolicyOut, Progress

if TYPE_CHECKING:
    from torch import Tensor


class DPO(Plain):
    """Direct preference optimization, on pairs of data or on the best and worst episodes of a task."""

    class Config(AlgorithmSettings):
        """Direct preference optimization."""

        sources: ClassVar[tuple[Literal["rollouts", "data"], ...]] = ("data", "rollouts")
        pairs: ClassVar[bool] = True

        beta: Annotated[float, Field(gt=0, le=1000)] = 0.1
        """How strongly the policy is held to the reference; smaller lets it move farther for the same margin."""
        loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
        """`sigmoid` is DPO; `ipo` aims at a margin of 1/(2 beta) and stops; `hinge` stops at a margin of 1/beta."""
        label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
        """Chance that the sides of a pair are swapped by mistake; for loss sigmoid only."""
        reference_free: bool = False
        """Leave the reference out of the margin, as if it found all answers equally likely."""
        length_normalised: bool = False
        """Mean instead of sum of an answer's log-probabilities, so that length counts for nothing."""

        @property
        def compares_episodes(self) -> bool:
            """A pair needs two."""
            return True

        @model_validator(mode="after")
        def _fits(self) -> DPO.Config:
            if self.label_smoothing > 0 and self.loss != "sigmoid":
                raise ValueError(f"label_smoothing has no meaning with loss {self.loss}")
            return self

    def __init__(self, config: Config) -> None:
        self.config = config
        self.needs = Needs(
            values=False,
            reference=not config.reference_free,
            old=False,
            credits_old=False,
            entropy=False,
            pairs=config.pairs,
        )
        self.bootstrap = False

    def credit(self, batch: Batch, progress: Progress) -> tuple[Batch, Sums]:
        """Weights of the two rows of each pair, and a mass of 1 a pair; rows of no pair have neither."""
        batch, sums = weighed(batch)
        if self.config.length_normalised:
            batch = batch.replace(weights=batch.weights / batch.mask.sum(1).clamp(min=1)[:, None])
        return batch, sums

    def loss(self, out: PolicyOut, batch: Batch, progress: Progress) -> tuple[dict[str, Tensor], Sums]:
        """mass: Σ over pairs of the loss."""
        preferred, other = self._scores(out, batch)
        each = self._loss(preferred - other)
        beta = self.config.beta
        sums = measured(beta * preferred, beta * other, each)
        return {"mass": each.sum(), "tokens": each.new_zeros(())}, sums

    def judge(self, out: PolicyOut, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Loss, accuracy and margin of each pair."""
        preferred, other = self._scores(out, batch)
        beta = self.config.beta
        return judged(beta * preferred, beta * other, self._loss(preferred - other))

    def _scores(self, out: PolicyOut, batch: Batch) -> tuple[Tensor, Tensor]:
        """Σ_t weights · (log π − log π_ref) of the pairs' preferred and other rows: implicit rewards over β, [P]."""
        scored = batch.weights > 0
        gained = out.logprobs.masked_fill(~scored, 0)
        if not self.config.reference_free:
            assert batch.ref_logprobs is not None
            gained = gained - batch.ref_logprobs.masked_fill(~scored, 0)
        rows = (batch.weights * gained).sum(1)
        preferred, other = pairs(batch)
        return rows[preferred], rows[other]

    def _loss(self, margin: Tensor) -> Tensor:
        config, losses = self.config, formulas.preferences
        if config.loss == "ipo":
            return losses.ipo(margin, config.beta)
        if config.loss == "hinge":
            return losses.hinge(margin, config.beta)
        return losses.sigmoid(margin, config.beta, config.label_smoothing)

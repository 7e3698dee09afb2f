"""Reward model: a score after the last token, trained so that preferred answers score higher.

Bradley and Terry 1952; Ouyang et al. 2022, "Training language models to follow instructions with human feedback",
Eq. 1, with one pair a comparison; centred as in Eisenstein et al. 2023, "Helping or Herding?". The score is the value
function at the end of the conversation, V(tokens[:length]), so that a checkpoint of this run is a critic to start from
as well. Left out: margins between grades, ensembles, and a score before the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from mrlm_cli import formulas
from mrlm_cli.algorithms.base import AlgorithmSettings, Needs, Plain
from mrlm_cli.algorithms.pairs import judged, measured, pairs, right, weighed
from mrlm_cli.metrics import Sums
from mrlm_cli.records import Batch, PolicyOut, Progress

if TYPE_CHECKING:
    from torch import Tensor


class RewardModel(Plain):
    """A reward model on preference pairs: the value function learns a score after the last token."""

    class Config(AlgorithmSettings):
        """Reward model."""

        sources: ClassVar[tuple[Literal["rollouts", "data"], ...]] = ("data",)
        pairs: ClassVar[bool] = True

        centre: Annotated[float, Field(ge=0, le=1000)] = 0.01
        """Factor on the squared sum of a pair's scores, which keeps the scores around 0; 0 leaves their offset open."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.needs = Needs(values=True, reference=False, old=False, logprobs=False, entropy=False, pairs=config.pairs)
        self.bootstrap = False

    def credit(self, batch: Batch, progress: Progress) -> tuple[Batch, Sums]:
        """A mass of 1 a pair; rows of no pair have neither weight nor mass."""
        return weighed(batch)

    def loss(self, out: PolicyOut, batch: Batch, progress: Progress) -> tuple[dict[str, Tensor], Sums]:
        """mass: Σ over pairs of the loss."""
        preferred, other = self._scores(out, batch)
        each = formulas.preferences.bradley_terry(preferred, other, self.config.centre)
        return {"mass": each.sum(), "tokens": each.new_zeros(())}, measured(preferred, other, each)

    def judge(self, out: PolicyOut, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Loss, accuracy and margin of each pair; `longer`: the accuracy of always preferring the longer answer."""
        preferred, other = self._scores(out, batch)
        each = formulas.preferences.bradley_terry(preferred, other, self.config.centre)
        first, second = pairs(batch)
        lengths = batch.mask.sum(1).to(each.dtype)
        return {
            **judged(preferred, other, each),
            "longer": (right(lengths[first] - lengths[second]), each.new_ones(len(each))),
        }

    def _scores(self, out: PolicyOut, batch: Batch) -> tuple[Tensor, Tensor]:
        assert out.final_values is not None
        preferred, other = pairs(batch)
        return out.final_values[preferred], out.final_values[other]

"""Settings that several algorithms share: clipping, entropy, the moving reference, and off-policy correction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from mrlm_cli import formulas, schedules
from mrlm_cli.records import Batch, Progress
from mrlm_cli.strict import Schedule, Strict

if TYPE_CHECKING:
    from torch import Tensor

Share = Annotated[float, Field(ge=0, le=1)]
ClipPair = Annotated[
    tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=100)]], Field(strict=False)
]


Aggregation = Literal["token", "sequence", "constant"]


class Entropy(Strict):
    """Reward for staying random."""

    coef: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Factor on the mean entropy, in nats a token, subtracted from the loss; 0 leaves exploration to sampling."""
    schedule: Schedule = "constant"
    """Shape of the coefficient over the run's `steps`; a decay lets the policy become sure of itself at the end."""
    floor: Share = 0.0
    """Fraction of coef at which a linear or cosine schedule ends."""

    def at(self, progress: Progress) -> float:
        """The coefficient in force."""
        return self.coef * schedules.factor(self.schedule, progress, floor=self.floor)


class ReferenceSync(Strict):
    """How the reference follows the policy: ref ← (1 − rate)·ref + rate·policy after every so many steps.

    Gorbatovski et al. 2024, "Learn Your Reference Model for Real Good Alignment": rate 1 is their hard update, a
    smaller one, every step, their soft update, a moving average.
    """

    every: Annotated[int, Field(ge=1, le=1_000_000_000)]
    """Steps from one synchronisation to the next."""
    rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the policy in the new reference: 1 copies the policy, less makes a moving average."""


class Importance(Strict):
    """Off-policy correction: importance weights π_old / π_sampler on the policy loss, bounded and without gradient."""

    level: Literal["token", "sequence"] = "token"
    """One weight a token, or the product over an episode's chosen tokens: unbiased, and of far higher variance."""
    form: Literal["truncate", "mask"] = "truncate"
    """A weight outside the bounds becomes the bound, or 0: `mask` learns nothing where the two disagree so much."""
    low: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Lower bound of the weights; 0 is none."""
    high: Annotated[float, Field(ge=1, le=1e6)] = 2.0
    """Upper bound of the weights."""

    def weights(self, batch: Batch, active: Tensor) -> tuple[Tensor, Tensor]:
        """(weights, where the raw ones lie outside the bounds) of a batch with `old_logprobs`; [B,T], 0 if inactive."""
        assert batch.old_logprobs is not None
        raw = formulas.weights.importance(batch.old_logprobs, batch.logprobs, active, self.level == "sequence")
        bounded, outside = formulas.weights.bounded(raw, self.low, self.high, self.form == "mask")
        return bounded.masked_fill(~active, 0), outside & active


def aggregated(
    aggregation: Aggregation, constant_length: int | None, batch: Batch, included: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights [B,T] and mass [B] of the included rows."""
    weights, dtype = formulas.weights, batch.rewards.dtype
    if constant_length is not None:
        return weights.constant(batch.mask, included, dtype, constant_length)
    aggregate = weights.token if aggregation == "token" else weights.sequence
    return aggregate(batch.mask, included, dtype)


class PolicyKL(Strict):
    """Penalty on the distance from the reference; what every algorithm with a reference has."""

    coef: Annotated[float, Field(ge=0, le=100)] = 0.0
    """β, in reward per nat or as factor on the loss term; 0 needs no reference model."""
    sync: ReferenceSync | None = None
    """How the reference follows the policy; null keeps the policy as loaded."""

    @model_validator(mode="after")
    def _fits(self) -> PolicyKL:
        if self.sync is not None and self.coef == 0:
            raise ValueError("sync needs a coef above 0: without one there is no reference")
        return self

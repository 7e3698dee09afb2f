"""The settings of the group methods: each chooses one thing, and every combination that has a meaning is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, create_model, model_validator

from mrlm_cli.algorithms.settings import Aggregation, ClipPair, Entropy, Importance, PolicyKL
from mrlm_cli.strict import AlgorithmSettings, Strict

Settings = TypeVar("Settings", bound=Strict)


class GroupKL(PolicyKL):
    """Penalty on the distance from the reference."""

    form: Literal["score", "reward", "k2", "k3", "k3+"] = "k3"
    """`score` takes β·Σ(log π − log π_ref) off an episode's score before baselines, `reward` β·(log π − log π_ref) off
    each chosen token's reward after them; k2, k3, k3+ (gradient of k2) are losses."""


class Overlong(Strict):
    """A soft penalty of long episodes."""

    limit: Annotated[int, Field(ge=1, le=10_000_000)]
    """Chosen tokens of an episode at which the whole penalty is due, usually the most it may choose."""
    buffer: Annotated[int, Field(ge=1, le=10_000_000)]
    """Tokens before the limit over which the penalty rises linearly from 0."""
    penalty: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Taken off the score of an episode that reaches the limit."""

    @model_validator(mode="after")
    def _fits(self) -> Overlong:
        if self.buffer > self.limit:
            raise ValueError(f"buffer must be at most limit = {self.limit}")
        return self


class GroupSettings(AlgorithmSettings):
    """Policy gradients without a value function."""

    baseline: Literal["group", "leave_one_out", "batch", "none"] = "group"
    """Subtracted from an episode's score: the mean of its task's episodes, of the others of them, or of the step's (of
    the same agent)."""
    scale: Literal["none", "group", "batch"] = "none"
    """Divides the difference by the standard deviation (n − 1) of the scores of the task's or the step's episodes."""
    scale_eps: Annotated[float, Field(gt=0, le=1)] = 1e-4
    """Added to that standard deviation; scores that do not differ, by 1e-6 at least, are not divided at all."""
    whiten: bool = False
    """Give the advantages of all chosen tokens of the step (of an agent) mean 0 and deviation 1, after all else."""
    ratio: Literal["token", "sequence_mean", "sequence_sum"] = "token"
    """π/π_old of each token, of the whole episode to the power 1/tokens, or of the whole episode."""
    objective: Literal["clip", "cispo"] = "clip"
    """`clip` is PPO's surrogate, which drops the gradient of clipped tokens; `cispo` clips the weight and keeps it."""
    clip: ClipPair | None = (0.2, 0.2)
    """How far the ratio may fall below and rise above 1: [low, high]; low 1 is no lower bound, null does not clip."""
    dual_clip: Annotated[float, Field(gt=1, le=1000)] | None = None
    """Where the advantage A is negative, bounds the loss at this times −A whatever the ratio; null does not."""
    aggregation: Aggregation = "token"
    """Policy loss over every chosen token alike, every episode alike, or each episode over `constant_length`."""
    constant_length: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Tokens by which aggregation constant divides an episode's sum, usually the most it may choose."""
    kl: GroupKL = GroupKL()
    """Penalty on the distance from the reference, which is the policy as loaded."""
    entropy: Entropy = Entropy()
    """Reward for staying random."""
    overlong: Overlong | None = None
    """A soft penalty of long episodes; null punishes none."""
    truncation: Literal["terminal", "mask"] = "terminal"
    """A cut episode: `terminal` is scored as it stands, `mask` neither trains nor counts in a baseline."""
    filter_flat: bool = False
    """Leave out tasks whose episodes all have the same reward; `sampling.refills` bounds what is sampled instead."""
    importance: Importance | None = None
    """Weigh the policy loss by bounded π_old / π_sampler; null ignores that the sampler was not quite π_old."""
    target_kl: Annotated[float, Field(gt=0, le=100)] | None = None
    """Ends an iteration's update once an optimizer step's approx_kl lies above it; null never stops early."""

    @model_validator(mode="after")
    def _fits(self) -> GroupSettings:
        if (self.aggregation == "constant") != (self.constant_length is not None):
            raise ValueError(
                "aggregation constant and constant_length belong together; "
                "give constant_length the most tokens that an episode may choose, such as sampling.max_new_tokens"
            )
        if self.scale == "none" and self.scale_eps != type(self).model_fields["scale_eps"].default:
            raise ValueError("scale_eps has no meaning with scale none, which divides nothing")
        if self.dual_clip is not None and (self.clip is None or self.objective == "cispo"):
            raise ValueError("dual_clip has no meaning without the objective clip and its bounds")
        if self.objective == "cispo" and self.clip is None:
            raise ValueError("objective cispo needs the bounds that clip gives")
        return self

    @property
    def compares_episodes(self) -> bool:
        """Whether the episodes of one task are compared with each other."""
        return self.baseline in ("group", "leave_one_out") or self.scale == "group" or self.filter_flat

    @property
    def leaves_groups_out(self) -> bool:
        """Whether flat groups are not trained on."""
        return self.filter_flat

    @property
    def clips_episodes(self) -> bool:
        """Whether the ratio is a whole episode's, or its mean."""
        return self.ratio != "token"


def variant(owner: str, sentence: str, kl: Mapping[str, Any] | None = None, **defaults: Any) -> type[GroupSettings]:
    """The settings under another name, with some defaults changed and nothing else, those inside `kl` included."""
    if kl is not None:
        penalty = _changed(GroupKL, f"{owner}.KL", GroupKL.__doc__ or "", kl)
        defaults["kl"] = penalty()
    return _changed(GroupSettings, f"{owner}.Config", sentence, defaults)


def _changed(base: type[Settings], name: str, sentence: str, defaults: Mapping[str, Any]) -> type[Settings]:
    fields: dict[str, Any] = {}
    for field, default in defaults.items():
        info = base.model_fields[field]
        annotation = type(default) if isinstance(default, Strict) else info.rebuild_annotation()
        fields[field] = (annotation, Field(default=default, description=info.description))
    made = create_model(name.rpartition(".")[2], __base__=base, __doc__=sentence, __module__=__name__, **fields)
    made.__qualname__ = name
    return made

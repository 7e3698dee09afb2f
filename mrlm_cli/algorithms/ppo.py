"""Proximal policy optimization for language models: a critic, GAE over chosen tokens, a clipped surrogate.

Schulman et al. 2017, "Proximal Policy Optimization Algorithms", Eq. 7 and 9; Schulman et al. 2016, "High-Dimensional
Continuous Control Using Generalized Advantage Estimation", Eq. 16; Ziegler et al. 2019, "Fine-Tuning Language Models
from Human Preferences", Section 2.2 (KL in the reward, adaptive β). Left out: the KL-penalised variant of PPO (Eq. 8),
which the clip replaced, and pretraining-loss mixing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from mrlm_cli import formulas
from mrlm_cli.algorithms.base import AlgorithmSettings, Needs
from mrlm_cli.algorithms.settings import Aggregation, ClipPair, Entropy, Importance, PolicyKL, Share, aggregated
from mrlm_cli.errors import CheckpointError
from mrlm_cli.metrics import Sums
from mrlm_cli.records import Batch, Episode, PolicyOut, Progress
from mrlm_cli.strict import Pair, Strict

if TYPE_CHECKING:
    from torch import Tensor

SCALE_FLOOR = 1e-6  # a running standard deviation below it divides nothing


class KL(PolicyKL):
    """Penalty on the distance from the reference."""

    form: Literal["reward", "k2", "k3", "k3+"] = "reward"
    """`reward` takes β·(log π − log π_ref) off each chosen token's reward; k2, k3, k3+ (gradient of k2) are losses."""
    target: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """KL in nats an episode towards which β adapts after every iteration; null keeps β fixed."""
    horizon: Annotated[int, Field(ge=1, le=1_000_000_000)] = 10_000
    """Episodes over which an adapting β may change by at most a fifth; smaller reacts faster."""

    @model_validator(mode="after")
    def _fits_target(self) -> KL:
        if self.target is not None and self.coef == 0:
            raise ValueError("target needs a coef above 0 to start from: a coefficient of 0 cannot adapt")
        return self


class ValuePretraining(Strict):
    """First iterations that train the value function alone, on episodes of the fixed policy."""

    steps: Annotated[int, Field(ge=1, le=1_000_000)]
    """Iterations, counted from the start of the run."""
    explained_variance: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Ends the pretraining after the first iteration whose values explain this share of the returns' variance."""


class PPO:
    """Proximal policy optimization with a critic: GAE over chosen tokens, clipped surrogate, KL, entropy."""

    class Config(AlgorithmSettings):
        """Proximal policy optimization."""

        clip: ClipPair = (0.2, 0.2)
        """How far the ratio may fall below and rise above 1 before its gradient stops: [low, high]."""
        dual_clip: Annotated[float, Field(gt=1, le=1000)] | None = None
        """Where the advantage A is negative, bounds the loss at this times −A whatever the ratio; null does not."""
        gamma: Share = 1.0
        """Discount from one chosen token to the next; 1 counts a late reward fully, as episodes are short."""
        gae_lambda: Share = 0.95
        """λ of the advantages: 1 trusts the rewards alone, 0 the values alone."""
        gae_lambda_value: Share | None = None
        """λ of the returns that the value function learns; by default gae_lambda."""
        value_coef: Annotated[float, Field(ge=0, le=1000)] = 0.5
        """Factor on the value loss."""
        value_clip: Annotated[float, Field(gt=0, le=1e6)] | None = None
        """How far a value may move from its old one before its gradient stops; null does not clip."""
        entropy: Entropy = Entropy()
        """Reward for staying random."""
        kl: KL = KL()
        """Penalty on the distance from the reference, which is the policy as loaded."""
        whiten_advantages: bool = True
        """Give each agent's advantages of the step mean 0 and deviation 1: the reward's scale does not matter."""
        whiten_rewards: bool = False
        """Bring each agent's per-token rewards, KL included, to standard deviation 1 around their own mean."""
        reward_clip: Pair | None = None
        """Bounds of each turn's reward, as [low, high] with low ≤ 0 ≤ high; null does not clip."""
        reward_scale: bool = False
        """Divide rewards by the running standard deviation of the episodes' rewards since the start of the run."""
        truncation: Literal["terminal", "bootstrap", "mask"] = "terminal"
        """A cut episode: `terminal` is scored as it stands, `bootstrap` adds its last value, `mask` leaves it out."""
        missing_end_penalty: Annotated[float, Field(ge=0, le=1e6)] = 0.0
        """Subtracted from the reward of an episode whose last reply was cut by length; for truncation terminal only."""
        target_kl: Annotated[float, Field(gt=0, le=100)] | None = None
        """Ends an iteration's update once an optimizer step's approx_kl lies above it; null never stops early."""
        value_pretraining: ValuePretraining | None = None
        """Train the value function alone first; null trains both from the first step."""
        aggregation: Aggregation = "token"
        """Policy loss over every chosen token alike, every episode alike, or each episode over `constant_length`."""
        constant_length: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
        """Tokens by which aggregation constant divides an episode's sum, usually the most it may choose."""
        importance: Importance | None = None
        """Weigh the policy loss by bounded π_old / π_sampler; null ignores that the sampler was not quite π_old."""

        @model_validator(mode="after")
        def _fits(self) -> PPO.Config:
            if self.reward_clip is not None and not self.reward_clip[0] <= 0 <= self.reward_clip[1]:
                raise ValueError("reward_clip must enclose 0, the reward of every token that earns none")
            if self.reward_clip is not None and self.reward_clip[0] == self.reward_clip[1]:
                raise ValueError("reward_clip leaves no reward")
            if self.missing_end_penalty > 0 and self.truncation != "terminal":
                raise ValueError(f"missing_end_penalty has no meaning with truncation {self.truncation}")
            if (self.aggregation == "constant") != (self.constant_length is not None):
                raise ValueError("constant_length belongs to aggregation constant, which needs it")
            return self

    def __init__(self, config: Config) -> None:
        self.config = config
        self.needs = Needs(values=True, reference=config.kl.coef > 0, sync=config.kl.sync)
        self.bootstrap = config.truncation == "bootstrap"
        self._next_kl_coef = config.kl.coef
        self._kl_coef = config.kl.coef  # the one of this iteration: credit and loss see the same
        self._reward_count, self._reward_mean, self._reward_m2 = 0, 0.0, 0.0  # of episodes' rewards, since the start
        self._value_trained_at: int | None = None  # the step at which the values explained enough

    def keep(self, group: Sequence[Episode]) -> str | None:
        """None: with a value function even a group of equal rewards teaches."""
        return None

    def credit(self, batch: Batch, progress: Progress) -> tuple[Batch, Sums]:
        """Rewards in DESIGN's order (§5.5), then GAE, returns, whitening, weights and mass of the whole step's batch.

        Needs `old_logprobs`, `values`, `final_values`, and `ref_logprobs` if the KL coefficient is above 0. Afterwards
        β, the running reward statistics and the end of value pretraining have moved on.
        """
        assert batch.old_logprobs is not None
        assert batch.values is not None
        assert batch.final_values is not None
        config, sums = self.config, Sums()
        cut = batch.truncated
        included = ~cut if config.truncation == "mask" else cut.new_ones(cut.shape)
        weights, mass = aggregated(config.aggregation, config.constant_length, batch, included)
        active = batch.mask & (mass > 0)[:, None]
        self._kl_coef = self._next_kl_coef
        rewards = self._rewards(batch, active, progress, sums)
        # After a true end there is nothing to come; a cut one is worth its last state only if we say so.
        final = batch.final_values.masked_fill(~cut if self.bootstrap else cut.new_ones(cut.shape), 0)
        gae = formulas.advantages.gae
        advantages = value_advantages = gae(rewards, batch.values, active, final, config.gamma, config.gae_lambda)
        if config.gae_lambda_value is not None:
            value_advantages = gae(rewards, batch.values, active, final, config.gamma, config.gae_lambda_value)
        returns = (value_advantages + batch.values).masked_fill(~active, 0)
        self._measure(batch, returns, active, progress, sums)
        std = formulas.advantages.masked_std(advantages, active)
        if config.whiten_advantages:
            advantages, std, centred = formulas.advantages.whiten(advantages, active, kind=batch.agent)
            sums.add("advantage_centred", centred.double())
        sums.add("advantage_std", std)
        return batch.replace(advantages=advantages, returns=returns, weights=weights, mass=mass), sums

    def loss(self, out: PolicyOut, batch: Batch, progress: Progress) -> tuple[dict[str, Tensor], Sums]:
        """Sums over this micro-batch, undivided.

        mass: Σ weights · (importance · clipped surrogate + β · KL term). tokens: Σ (value_coef · value loss −
        entropy coefficient · entropy) over the chosen tokens of rows with mass. While only the value function is
        trained, `mass` is 0 and `tokens` the value loss alone.
        """
        assert out.values is not None
        assert batch.old_logprobs is not None
        assert batch.values is not None
        assert batch.returns is not None
        assert batch.advantages is not None
        config, losses, sums = self.config, formulas.losses, Sums()
        active = batch.mask & (batch.mass > 0)[:, None]
        tokens, mass = active.sum(), batch.mass.sum()

        def only(x: Tensor) -> Tensor:
            return x.masked_fill(~active, 0)  # 0 · NaN would be NaN, also in the gradient

        values, old_values, returns = only(out.values), only(batch.values), only(batch.returns)
        value_loss = only(losses.value_loss(values, old_values, returns, config.value_clip)).sum()
        sums.add("value_loss", value_loss.detach(), tokens)
        if config.value_clip is not None:
            sums.add("value_clip_fraction", ((values - old_values).abs() > config.value_clip).sum(), tokens)
        if self.value_only(progress):
            return {"mass": value_loss.new_zeros(()), "tokens": config.value_coef * value_loss}, sums

        logprobs, old_logprobs, advantages = only(out.logprobs), only(batch.old_logprobs), only(batch.advantages)
        surrogate = losses.clipped_surrogate(logprobs, old_logprobs, advantages, *config.clip, config.dual_clip)
        if config.importance is not None:
            surrogate = surrogate * config.importance.weights(batch, active)[0]
        policy_loss = (batch.weights * surrogate).sum()
        coefficient = config.entropy.at(progress)
        entropy = only(out.entropy if coefficient else out.entropy.detach()).sum()
        total = policy_loss
        if self._kl_coef > 0 and config.kl.form != "reward":
            assert batch.ref_logprobs is not None
            estimate = {"k2": formulas.kl.k2, "k3": formulas.kl.k3, "k3+": formulas.kl.k3_plus}[config.kl.form]
            kl_loss = (batch.weights * estimate(logprobs, only(batch.ref_logprobs))).sum()
            total = total + self._kl_coef * kl_loss
            sums.add("kl_loss", kl_loss.detach(), mass)
        logprobs = logprobs.detach()
        sums.add("policy_loss", policy_loss.detach(), mass)
        sums.add("entropy", entropy.detach(), tokens)
        sums.add("approx_kl", losses.approx_kl(logprobs, old_logprobs).sum(), tokens)
        sums.add("clip_fraction", losses.clipped(logprobs, old_logprobs, *config.clip).sum(), tokens)
        sums.add("policy_moved", (logprobs - old_logprobs).abs().sum(), tokens)
        return {
            "mass": total,
            "tokens": config.value_coef * value_loss - coefficient * entropy,
        }, sums

    def value_only(self, progress: Progress) -> bool:
        """True during value pretraining, the iteration that reached its target explained variance included."""
        pretraining = self.config.value_pretraining
        if pretraining is None or progress.step >= pretraining.steps:
            return False
        return self._value_trained_at is None or progress.step <= self._value_trained_at

    def stop(self, metrics: dict[str, float]) -> bool:
        """True once an optimizer step's approx_kl, measured before that step, is above target_kl (not 1.5 times it)."""
        return self.config.target_kl is not None and metrics.get("approx_kl", 0.0) > self.config.target_kl

    def state(self) -> dict[str, Any]:
        """β, the running statistics of the rewards, and where value pretraining ended."""
        return {
            "kl_coef": self._next_kl_coef,
            "reward_count": self._reward_count,
            "reward_mean": self._reward_mean,
            "reward_m2": self._reward_m2,
            "value_trained_at": self._value_trained_at,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave. Raises CheckpointError if it is another algorithm's."""
        if set(state) != set(self.state()):
            raise CheckpointError(f"the checkpoint's algorithm is not PPO: its state holds {sorted(state)}")
        self._next_kl_coef = self._kl_coef = state["kl_coef"]
        self._reward_count = state["reward_count"]
        self._reward_mean = state["reward_mean"]
        self._reward_m2 = state["reward_m2"]
        self._value_trained_at = state["value_trained_at"]

    def _rewards(self, batch: Batch, active: Tensor, progress: Progress, sums: Sums) -> Tensor:
        """clip → missing-end penalty → scaling → −β·k1 → whitening; [B,T], zero outside `active`."""
        config = self.config
        rewards = batch.rewards.masked_fill(~active, 0)
        if config.reward_clip is not None:
            rewards = rewards.clamp(*config.reward_clip)
        if config.missing_end_penalty > 0:
            cut = (batch.truncated & ~batch.ended)[:, None] & formulas.advantages.last_chosen(active)
            rewards = rewards - config.missing_end_penalty * cut.to(rewards.dtype)
        if config.reward_scale:
            self._observe_rewards(rewards[active.any(1)].double().sum(1))
            scale = self._reward_std()
            rewards = rewards / scale
            sums.add("reward_scale", scale)
        if self.needs.reference:
            rewards = self._penalised(rewards, batch, active, progress, sums)
        if config.whiten_rewards:
            rewards, _, _ = formulas.advantages.whiten(rewards, active, keep_mean=True, kind=batch.agent)
        return rewards

    def _penalised(self, rewards: Tensor, batch: Batch, active: Tensor, progress: Progress, sums: Sums) -> Tensor:
        """Rewards with this iteration's KL penalty if it belongs there; measures the KL and adapts the next β."""
        assert batch.old_logprobs is not None
        assert batch.ref_logprobs is not None
        k1 = formulas.kl.k1(batch.old_logprobs, batch.ref_logprobs).detach().masked_fill(~active, 0)
        episodes = int(active.any(1).sum())
        total = float(k1.double().sum())
        sums.add("kl", total, episodes)
        sums.add("kl_coef", self._kl_coef)
        # A policy that is held fixed cannot come nearer to the target, and a NaN must not outlive its step.
        target = self.config.kl.target
        if target is not None and episodes and math.isfinite(total) and not self.value_only(progress):
            error = min(max(total / episodes / target - 1, -0.2), 0.2)
            # Ziegler et al. 2019, Section 2.2; n is capped at the horizon, so that β stays positive.
            self._next_kl_coef = self._kl_coef * (1 + error * min(1.0, episodes / self.config.kl.horizon))
        return rewards - self._kl_coef * k1 if self.config.kl.form == "reward" else rewards

    def _measure(self, batch: Batch, returns: Tensor, active: Tensor, progress: Progress, sums: Sums) -> None:
        assert batch.values is not None
        tokens = active.sum()
        explained = float(formulas.advantages.explained_variance(batch.values, returns, active))
        if math.isfinite(explained):  # returns that do not vary have none
            sums.add("explained_variance", explained)
        sums.add("return", returns.double().sum(), tokens)
        sums.add("value_bias", (batch.values - returns).double().masked_fill(~active, 0).sum(), tokens)
        if not self.value_only(progress):
            sums.add("entropy_coef", self.config.entropy.at(progress))
        if self.config.importance is not None:
            importance, outside = self.config.importance.weights(batch, active)
            sums.add("importance_weight", importance.double().sum(), tokens)
            sums.add("importance_bounded", outside.sum(), tokens)
        pretraining = self.config.value_pretraining
        if pretraining is not None:
            training = self.value_only(progress)
            sums.add("value_pretraining", float(training))
            if training and pretraining.explained_variance is not None and explained >= pretraining.explained_variance:
                self._value_trained_at = progress.step

    def _observe_rewards(self, rewards: Tensor) -> None:
        """Chan, Golub and LeVeque 1983, "Algorithms for Computing the Sample Variance": join two sets' moments."""
        count = len(rewards)
        if count == 0 or not bool(rewards.isfinite().all()):
            return
        mean = float(rewards.mean())
        m2 = float((rewards - mean).square().sum())
        together = self._reward_count + count
        shift = mean - self._reward_mean
        self._reward_mean += shift * count / together
        self._reward_m2 += m2 + shift**2 * self._reward_count * count / together
        self._reward_count = together

    def _reward_std(self) -> float:
        if self._reward_count < 2:
            return 1.0
        std = math.sqrt(self._reward_m2 / (self._reward_count - 1))
        return std if std >= SCALE_FLOOR else 1.0

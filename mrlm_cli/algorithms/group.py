"""Policy gradients without a value function: GRPO and its relatives as one set of orthogonal settings.

An episode's score is the sum of its rewards, less an overlong penalty, less β·Σ k1 where `kl.form` is score. The
advantage is (score − baseline) / (scale + eps), the same at every chosen token, less β times the k1 still to come
where `kl.form` is reward; then, if asked for, whitened over all chosen tokens of the step. Where several agents learn,
what is of the step is of each agent's part of it: opposing roles share no baseline. A scale below 1e-6 divides nothing.
Failed episodes are in no baseline; one that has nobody to be compared with has advantage 0 and is counted.

Each variant changes defaults only and says which equations it stands for. Left out of all: several turns are not
credited apart (the score is the whole episode's), rewards are not discounted, and log-ratios are clamped to ±20.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mrlm_cli import formulas
from mrlm_cli.algorithms.base import Needs
from mrlm_cli.algorithms.group_settings import GroupSettings, variant
from mrlm_cli.algorithms.settings import aggregated
from mrlm_cli.errors import CheckpointError
from mrlm_cli.metrics import Sums
from mrlm_cli.records import Batch, Episode, PolicyOut, Progress

if TYPE_CHECKING:
    from torch import Tensor

BEFORE = ("score", "reward")  # forms of the KL that are credited, where the others are in the loss
FLAT = 1e-6  # scores that differ by less are equal


class Group:
    """Policy gradients without a value function, every setting open."""

    Config: type[GroupSettings] = GroupSettings

    def __init__(self, config: GroupSettings) -> None:
        self.config = config
        self.needs = Needs(
            values=False,
            reference=config.kl.coef > 0,
            sync=config.kl.sync,
            credits_old=config.importance is not None or (config.kl.coef > 0 and config.kl.form in BEFORE),
        )
        self.bootstrap = False

    def keep(self, group: Sequence[Episode]) -> str | None:
        """With `filter_flat`, a reason against a group whose rewards, before any penalty, do not differ by 1e-6.

        A group whose episodes all failed is not judged: it is no news about the task.
        """
        if not self.config.filter_flat or all(one.stop == "failed" for one in group):
            return None
        cut = ("length", "turns") if self.config.truncation == "mask" else ()
        scores = [sum(one.rewards) for one in group if one.stop not in ("failed", *cut) and one.chosen]
        if len(scores) < 2:
            return "fewer than two episodes to compare"
        return "all episodes have the same reward" if max(scores) - min(scores) < FLAT else None

    def credit(self, batch: Batch, progress: Progress) -> tuple[Batch, Sums]:
        """Advantages, weights and mass of the whole step's batch; needs `ref_logprobs` for a KL.

        Needs `old_logprobs` where `needs.credits_old` says so. A KL in the loss is measured there.
        """
        config, sums = self.config, Sums()
        included = batch.mask.any(1)
        if config.truncation == "mask":
            included = included & ~batch.truncated
        weights, mass = aggregated(config.aggregation, config.constant_length, batch, included)
        active = batch.mask & included[:, None]
        scores = batch.rewards.double().masked_fill(~active, 0).sum(1)  # [B]
        if config.overlong is not None:
            long = formulas.groups.overlong(active.sum(1), config.overlong.limit, config.overlong.buffer)
            scores = scores - config.overlong.penalty * long
            sums.add("overlong_penalty", config.overlong.penalty * long.masked_fill(~included, 0).sum(), included.sum())
        penalties = self._kl_penalties(batch, active, sums)  # [B,T]
        if config.kl.form == "score":
            scores = scores - penalties.sum(1)
        everyone = batch.group.new_zeros(batch.group.shape) if batch.agent is None else batch.agent
        advantages, compared = self._compared(scores, batch.group, everyone, included, sums)
        tokens = batch.mask & compared[:, None]
        per_token = advantages[:, None].masked_fill(~tokens, 0)
        if config.kl.form == "reward":
            per_token = per_token - formulas.advantages.reward_to_go(penalties, tokens)
        sums.add("advantage_std", formulas.advantages.masked_std(per_token, tokens))
        if config.whiten and bool(tokens.any()):
            per_token, _, centred = formulas.advantages.whiten(per_token, tokens, kind=batch.agent)
            sums.add("advantage_centred", centred.double())
        sums.add("entropy_coef", config.entropy.at(progress))
        if config.importance is not None:
            importance, outside = config.importance.weights(batch, active)
            sums.add("importance_weight", importance.double().sum(), active.sum())
            sums.add("importance_bounded", outside.sum(), active.sum())
        credited = per_token.to(batch.rewards.dtype)
        return batch.replace(advantages=credited, weights=weights, mass=mass), sums

    def loss(self, out: PolicyOut, batch: Batch, progress: Progress) -> tuple[dict[str, Tensor], Sums]:
        """Sums over this micro-batch, undivided.

        mass: Σ weights · (importance · policy loss + β · KL term). tokens: −entropy coefficient · Σ entropy over the
        chosen tokens of rows with mass.
        """
        assert batch.old_logprobs is not None
        assert batch.advantages is not None
        config, losses, sums = self.config, formulas.losses, Sums()
        active = batch.mask & (batch.mass > 0)[:, None]
        tokens, mass = active.sum(), batch.mass.sum()

        def only(x: Tensor) -> Tensor:
            return x.masked_fill(~active, 0)  # 0 · NaN would be NaN, also in the gradient

        logprobs, old_logprobs = only(out.logprobs), only(batch.old_logprobs)
        per_token, log_ratios = self._policy_loss(logprobs, old_logprobs, only(batch.advantages), active)
        if config.importance is not None:
            per_token = per_token * config.importance.weights(batch, active)[0]
        policy_loss = (batch.weights * per_token).sum()
        coefficient = config.entropy.at(progress)
        entropy = only(out.entropy if coefficient else out.entropy.detach()).sum()
        total = policy_loss
        if config.kl.coef > 0 and config.kl.form not in BEFORE:
            assert batch.ref_logprobs is not None
            estimate = {"k2": formulas.kl.k2, "k3": formulas.kl.k3, "k3+": formulas.kl.k3_plus}[config.kl.form]
            kl_loss = (batch.weights * estimate(logprobs, only(batch.ref_logprobs))).sum()
            total = total + config.kl.coef * kl_loss
            sums.add("kl_loss", kl_loss.detach(), mass)
            _measured_k1(batch, active, sums)
        logprobs, log_ratios = logprobs.detach(), log_ratios.detach()
        sums.add("policy_loss", policy_loss.detach(), mass)
        sums.add("entropy", entropy.detach(), tokens)
        sums.add("approx_kl", losses.approx_kl(logprobs, old_logprobs).sum(), tokens)
        if config.clip is not None:
            outside = losses.clipped(log_ratios, log_ratios.new_zeros(log_ratios.shape), *config.clip)
            if config.clips_episodes:  # an episode is one action: long ones count no more than short ones
                sums.add("clip_fraction", outside.any(1).sum(), active.any(1).sum())
            else:
                sums.add("clip_fraction", outside.sum(), tokens)
        sums.add("policy_moved", (logprobs - old_logprobs).abs().sum(), tokens)
        return {"mass": total, "tokens": -coefficient * entropy}, sums

    def value_only(self, progress: Progress) -> bool:
        """False: there is no value function."""
        return False

    def stop(self, metrics: dict[str, float]) -> bool:
        """True once an optimizer step's approx_kl, measured before that step, is above target_kl."""
        return self.config.target_kl is not None and metrics.get("approx_kl", 0.0) > self.config.target_kl

    def state(self) -> dict[str, Any]:
        """Nothing: every step is credited by itself."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError if it is another algorithm's."""
        if state:
            raise CheckpointError(f"the checkpoint's algorithm is no group method: its state holds {sorted(state)}")

    def _kl_penalties(self, batch: Batch, active: Tensor, sums: Sums) -> Tensor:
        """β·k1 of every chosen token in float64; 0 where the KL is in the loss and measured there, or nowhere."""
        if self.config.kl.coef > 0:
            sums.add("kl_coef", self.config.kl.coef)
        if self.config.kl.coef == 0 or self.config.kl.form not in BEFORE:
            return batch.rewards.new_zeros(batch.rewards.shape).double()
        return self.config.kl.coef * _measured_k1(batch, active, sums)

    def _compared(
        self, scores: Tensor, group: Tensor, everyone: Tensor, included: Tensor, sums: Sums
    ) -> tuple[Tensor, Tensor]:
        """Advantages [B] and which rows have one: not those that a baseline has nobody to compare with.

        `everyone` groups the step: all rows, or those of each agent, as opposing roles share no baseline.
        """
        config, groups = self.config, formulas.groups
        siblings = groups.size(group, included)
        flat = included & (siblings > 1) & (groups.std(scores, group, included) < FLAT)
        sums.add("flat_rate", flat.sum(), (included & (siblings > 1)).sum())
        compared, advantages = included, scores
        if config.baseline != "none":
            others = everyone if config.baseline == "batch" else group
            compared = included & (groups.size(others, included) > 1)
            baseline = groups.leave_one_out if config.baseline == "leave_one_out" else groups.mean
            advantages = scores - baseline(scores, others, included)
            sums.add("lone_episodes", (included & ~compared).sum())
        if config.scale != "none":
            spread = groups.std(scores, group if config.scale == "group" else everyone, included)
            # Without spread there is no scale: eps alone would make ten thousand of a score, or signal of rounding.
            advantages = advantages / (spread + config.scale_eps).masked_fill(spread < FLAT, 1.0)
        return advantages.masked_fill(~compared, 0), compared

    def _policy_loss(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, active: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Per-token loss and the log-ratios in force; [B,T] each."""
        config, losses = self.config, formulas.losses
        if config.ratio == "token":
            log_ratios = logprobs - old_logprobs
        else:
            log_ratios = losses.sequence_log_ratio(logprobs, old_logprobs, active, config.ratio == "sequence_mean")
        if config.clip is None:
            return losses.importance_weighted(log_ratios, advantages), log_ratios
        if config.objective == "cispo":
            return losses.cispo(logprobs, log_ratios, advantages, *config.clip), log_ratios
        unit = log_ratios.new_zeros(log_ratios.shape)  # log-ratios against 0 are themselves
        return losses.clipped_surrogate(log_ratios, unit, advantages, *config.clip, config.dual_clip), log_ratios


def _measured_k1(batch: Batch, active: Tensor, sums: Sums) -> Tensor:
    """k1 of the old log-probs in float64, [B,T], 0 outside `active`; measured as `kl`, nats per episode.

    Of the old ones, so before the update: the first step of a run says 0, wherever the KL enters.
    """
    assert batch.old_logprobs is not None
    assert batch.ref_logprobs is not None
    k1 = formulas.kl.k1(batch.old_logprobs, batch.ref_logprobs).detach().double().masked_fill(~active, 0)
    sums.add("kl", k1.sum(), active.any(1).sum())
    return k1


class GRPO(Group):
    """Group relative policy optimization: group mean and deviation, token ratios, k3 in the loss.

    Shao et al. 2024, "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models", Eq. 3 and 4,
    outcome supervision of Section 4.1.2; β is theirs, the clip is PPO's usual one. The deviation has n − 1, which the
    paper leaves open, and eps. Left out: process supervision (a reward for each step of reasoning) and their iterative
    refreshing of a reward model; `kl.sync` refreshes the reference.
    """

    Config = variant(
        "GRPO",
        "Group relative policy optimization.",
        scale="group",
        aggregation="sequence",
        kl={"coef": 0.04, "form": "k3"},
    )


class DrGRPO(Group):
    """GRPO done right: neither the deviation nor an episode's length divides anything; needs constant_length.

    Liu et al. 2025, "Understanding R1-Zero-Like Training: A Critical Perspective", Section 3.2: the objective of Eq. 2
    with the group's mean as baseline, summed as in Listing 1. No KL, as there. Left out: nothing; the constant is a
    setting, as it scales the loss only.
    """

    Config = variant("DrGRPO", "GRPO done right.", aggregation="constant")


class DAPO(Group):
    """Decoupled clip and dynamic sampling: GRPO by tokens, without KL, a higher upper clip, flat groups resampled.

    Yu et al. 2025, "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", Eq. 8 to 13. Its overlong penalty
    (Eq. 13) depends on the limit of tokens, so that it is off until `overlong` says which. Flat means equal rewards,
    where the paper asks for accuracy 0 or 1; resampling ends after `sampling.refills` rounds, where theirs goes on
    until the batch is full. Left out: nothing else.
    """

    Config = variant(
        "DAPO",
        "Decoupled clip and dynamic sampling policy optimization.",
        scale="group",
        clip=(0.2, 0.28),
        filter_flat=True,
    )


class GSPO(Group):
    """Group sequence policy optimization: one length-normalised ratio for the whole episode.

    Zheng et al. 2025, "Group Sequence Policy Optimization", Eq. 5 to 7, with the clipping range of Section 5.1. Left
    out: GSPO-token (Eq. 13), the same in value and gradient as long as all tokens of an episode share one advantage.
    """

    Config = variant(
        "GSPO",
        "Group sequence policy optimization.",
        scale="group",
        ratio="sequence_mean",
        clip=(3e-4, 4e-4),
        aggregation="sequence",
    )


class CISPO(Group):
    """Clipped importance-sampling weights: every token keeps its gradient, only its weight is bounded.

    MiniMax 2025, "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention", Eq. 4 and 5: the weight
    is clip(ρ, 1 − ε_low, 1 + ε_high), here without a lower bound (ε_low = 1), as in their experiments. The paper is
    followed, and verl with it; TRL clamps at ε_high itself, not at 1 + ε_high, so that its recommended 5.0 is 4.0 here.
    Left out: the dynamic sampling and length penalty that they borrow from DAPO are settings, off by default.
    """

    Config = variant("CISPO", "Clipped importance-sampling weights.", scale="group", objective="cispo", clip=(1.0, 4.0))


class RLOO(Group):
    """REINFORCE leave-one-out: each episode against the mean of its siblings, as one action each.

    Ahmadian et al. 2024, "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in
    LLMs" (arXiv 2402.14740v2): the gradient of Eq. 6 less a baseline (Eq. 7), here that of Section 2.3, which has no
    number there and is due to Kool et al. 2019: A_i = s_i − Σ_{j≠i} s_j / (k − 1) for k episodes of a task. The score s
    holds −β·Σ k1 (Eq. 3) *before* the baseline, as in the paper and in TRL, so that a sibling's KL is in the baseline
    too; verl puts a KL into the loss unless told otherwise. The paper's gradient has no ratio; on fresh samples ours is
    1, and for more steps the ratio of whole episodes is clipped, as in TRL. An episode's log-prob is a sum, never
    divided by its length. Left out: nothing.
    """

    Config = variant(
        "RLOO",
        "REINFORCE leave-one-out.",
        baseline="leave_one_out",
        ratio="sequence_sum",
        aggregation="sequence",
        kl={"coef": 0.05, "form": "score"},
    )


class ReinforcePlusPlus(Group):
    """REINFORCE++: no baseline, the KL still to come off each token, advantages whitened over the whole step.

    Hu et al. 2025, "REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Normalization" (arXiv
    2501.03262v9): A_t = r − β Σ_{i≥t} k1_i (Eq. 4), normalised by mean and deviation over the batch (Eq. 5), here of
    all its chosen tokens; PPO's objective (Eq. 1), but every token of the step alike, as in the authors' code, where
    the equation averages each episode over its own length first (`aggregation: sequence`). Left out: the clipping of
    rewards in that code.
    """

    Config = variant(
        "ReinforcePlusPlus", "REINFORCE++.", baseline="none", whiten=True, kl={"coef": 0.01, "form": "reward"}
    )


class ReinforcePlusPlusBaseline(Group):
    """REINFORCE++ with baseline: the group mean is subtracted, then advantages are whitened over the whole step.

    Hu et al. 2025, as above, "REINFORCE++ w/ Baseline", Eq. 6 to 8: k2 in the loss instead of k1 in the reward, since
    its gradient is that of the KL. The deviation is that of the differences, over all tokens. Left out: nothing.
    """

    Config = variant(
        "ReinforcePlusPlusBaseline", "REINFORCE++ with baseline.", whiten=True, kl={"coef": 0.01, "form": "k2"}
    )

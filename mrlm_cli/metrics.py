"""Every metric's sentence, formula and good range; and sums that reduce themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


class Sums:
    """Metrics as (sum, count), so that micro-batches and ranks add up to the true mean: never a mean of means.

    Sums and counts may be floats or zero-dimensional tensors; tensors are read only by `means`.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Any, Any]] = {}

    def add(self, name: str, total: Any, count: Any = 1.0) -> None:
        """Add a sum over `count` items."""
        old = self._sums.get(name)
        self._sums[name] = (total, count) if old is None else (old[0] + total, old[1] + count)

    def update(self, other: Sums) -> None:
        """Add another collection."""
        for name, (total, count) in other:
            self.add(name, total, count)

    def __iter__(self) -> Iterator[tuple[str, tuple[Any, Any]]]:
        return iter(self._sums.items())

    def means(self) -> dict[str, float]:
        """sum / count by name; what has count 0 is undefined and absent."""
        return {name: float(total) / float(count) for name, (total, count) in self._sums.items() if float(count) != 0}


@dataclass(frozen=True, slots=True)
class Metric:
    """What `mrlm explain` says of a metric; `name` may hold a `*` for an environment's, component's or fact's name."""

    name: str
    sentence: str
    formula: str
    good: str


def _table(*rows: Metric) -> dict[str, Metric]:
    return {row.name: row for row in rows}


METRICS: dict[str, Metric] = _table(
    Metric("step", "Updates done so far.", "n", "rises by one a line"),
    Metric(
        "seconds",
        "Wall time of the iteration without evaluation and checkpoint.",
        "rollout + scoring + update",
        "steady",
    ),
    Metric("rollout_seconds", "Wall time of sampling episodes.", "clock", "steady"),
    Metric("scoring_seconds", "Wall time of scoring passes before the update.", "clock", "below rollout_seconds"),
    Metric("update_seconds", "Wall time of forward, backward and optimizer.", "clock", "steady"),
    Metric(
        "tokens_per_second",
        "Chosen tokens by wall time of the iteration.",
        "chosen tokens / seconds",
        "higher is faster",
    ),
    Metric("memory_mb", "Peak resident memory of the process so far, in MiB.", "getrusage", "flat after some steps"),
    Metric(
        "reward",
        "Mean training reward of an episode, as the weighted sum of its components.",
        "mean over episodes of Σ_t reward",
        "rises",
    ),
    Metric(
        "reward_std",
        "Spread of the reward over the episodes of the step.",
        "standard deviation over episodes",
        "above 0; at 0 there is nothing to learn from",
    ),
    Metric(
        "reward/*/*",
        "Mean of one environment's reward component, unweighted; sampled, so below the greedy evaluation. "
        "Where there are several agents, also by agent: reward/environment/agent/component.",
        "mean over episodes of Σ turns",
        "rises if it is what you want",
    ),
    Metric(
        "reward/*",
        "Mean of one of the recipe's rewards, unweighted; sampled.",
        "mean over episodes",
        "rises if it is what you want",
    ),
    Metric(
        "failed/*",
        "Episodes that one of the recipe's rewards failed to score; they count as failed and are not trained on.",
        "count",
        "absent",
    ),
    Metric("fact/*/*", "Mean of a number that an environment reports.", "mean over episodes", "the environment's own"),
    Metric(
        "episodes", "Episodes trained on.", "count", "tasks_per_step × episodes_per_task, for each agent that learns"
    ),
    Metric(
        "sampled_tokens",
        "Chosen tokens of all episodes sampled, filtered groups included.",
        "count",
        "the cost of a step",
    ),
    Metric("groups", "Groups (a task's episodes for one agent) trained on.", "count", "the recipe's tasks_per_step"),
    Metric(
        "filtered_groups",
        "Groups that the algorithm left out, such as those whose rewards are all equal.",
        "count",
        "well below groups; if not, the tasks are too easy or too hard",
    ),
    Metric(
        "refilled_groups", "Groups sampled in place of filtered ones, kept or not.", "count", "as many as were filtered"
    ),
    Metric(
        "failed_rate",
        "Share of episodes that failed for a technical reason; excluded, never scored as wrong.",
        "failed / all",
        "0",
    ),
    Metric(
        "excluded_rate",
        "Share of episodes left out because their prompt, or their row of data, does not fit the limits.",
        "excluded / all",
        "0",
    ),
    Metric(
        "truncated_rate",
        "Share of episodes cut by a length or turn limit.",
        "truncated / episodes",
        "near 0 once trained",
    ),
    Metric(
        "length",
        "Chosen tokens of an episode.",
        "mean over episodes",
        "steady; a collapse or a climb to the limit is a warning",
    ),
    Metric("turns", "Replies of the policy in an episode.", "mean over episodes", "the task's own"),
    Metric(
        "sampler_gap",
        "How far the sampler's log-probs are from the trainer's before the update.",
        "mean |log π_sampler − log π_old|",
        "below 1e-4 in float32, below 0.1 in bfloat16",
    ),
    Metric(
        "sampler_gap_max",
        "The largest such gap in the step.",
        "max |log π_sampler − log π_old|",
        "below 1e-3 in float32, below 1 in bfloat16",
    ),
    Metric(
        "policy_moved",
        "How far the update moved the policy on its own episodes, at its last optimizer step.",
        "mean |log π − log π_old|",
        "0.001 to 0.1",
    ),
    Metric(
        "loss",
        "What an algorithm on data minimises: for sft the mean of −log π over weighted tokens, else over pairs.",
        "Σ loss / Σ mass",
        "falls; on held-out rows too, or it is learnt by heart",
    ),
    Metric("tied_rate", "Share of tasks that made no pair, as all rewards were equal.", "tied / tasks", "well below 1"),
    Metric("pair_accuracy", "Share of pairs whose preferred side scores higher.", "mean[margin > 0]", "above 0.5"),
    Metric(
        "pair_margin",
        "How much higher the preferred side scores: β × log-ratios for dpo, the scores of a reward model.",
        "mean(r_preferred − r_other)",
        "rises",
    ),
    Metric("preferred_reward", "Mean score of the preferred sides, as in pair_margin.", "mean r", "rises"),
    Metric("other_reward", "Mean score of the other sides, as in pair_margin.", "mean r", "falls"),
    Metric("reply_loss", "Mean of −log π at the tokens of replies, in nats.", "mean −log π", "falls"),
    Metric("observation_loss", "Mean of −log π at the tokens of observations, in nats.", "mean −log π", "falls"),
    Metric(
        "approx_kl",
        "KL from the old to the new policy, estimated over all optimizer steps.",
        "mean((ρ − 1) − log ρ)",
        "below 0.05",
    ),
    Metric(
        "clip_fraction",
        "Share of chosen tokens whose ratio lies outside the clip range; of episodes, where the ratio is an episode's.",
        "mean[ρ outside [1−ε_low, 1+ε_high]]",
        "0 to 0.3 of tokens; more of episodes, while not nearly all after an iteration's first optimizer step",
    ),
    Metric(
        "value_clip_fraction",
        "Share of values moved farther than the value clip.",
        "mean[|V − V_old| > ε_v]",
        "0 to 0.3",
    ),
    Metric(
        "entropy",
        "Entropy of the policy at its chosen tokens, in nats.",
        "mean H(π(·|s))",
        "falls slowly; near 0 exploration is over",
    ),
    Metric("entropy_coef", "Entropy coefficient in force.", "coef × schedule", "as set"),
    Metric(
        "policy_loss", "Clipped surrogate loss.", "Σ max(−Aρ, −A clip(ρ)) / Σ mass", "near 0; its value says little"
    ),
    Metric("value_loss", "Squared error of the value function.", "½ mean max((V−R)², (clip(V)−R)²)", "falls"),
    Metric(
        "explained_variance",
        "Share of the returns' variance that the values explain.",
        "1 − var(R − V) / var(R)",
        "rises towards 1; well below 0 the critic is worse than a constant",
    ),
    Metric("value_bias", "Mean error of the values.", "mean(V − R)", "near 0"),
    Metric("return", "Mean return at the chosen tokens.", "mean R", "rises with the reward"),
    Metric("advantage_std", "Spread of the advantages before whitening.", "std over chosen tokens", "above 0"),
    Metric(
        "flat_rate",
        "Share of episodes whose siblings all have the same score: they teach nothing.",
        "mean over episodes with siblings[std of the group's scores < 1e-6]",
        "well below 1",
    ),
    Metric(
        "lone_episodes",
        "Episodes with nobody to be compared with: advantage 0 under a baseline, or no pair.",
        "count",
        "0; as many as lost their siblings by failures",
    ),
    Metric("overlong_penalty", "Mean penalty of long episodes.", "mean over episodes", "falls towards 0"),
    Metric("advantage_centred", "1 if the advantages had no spread and were only centred.", "[std < 1e-6]", "0"),
    Metric(
        "kl",
        "KL from the policy to the reference, in nats an episode.",
        "mean over episodes of Σ_t (log π − log π_ref)",
        "grows slowly; some nats are the price of a new format",
    ),
    Metric("reference_synced", "1 if the reference moved towards the policy after this step.", "flag", "as set"),
    Metric("kl_coef", "KL coefficient in force.", "β", "as set, or adapting to the target"),
    Metric("kl_loss", "KL penalty in the loss, before its coefficient.", "Σ k / Σ mass", "small"),
    Metric(
        "reward_scale",
        "Running standard deviation by which rewards are divided.",
        "running std of the reward",
        "steady",
    ),
    Metric(
        "importance_weight",
        "Mean importance weight from sampler to trainer.",
        "mean of bounded exp(log π_old − log π_sampler)",
        "near 1",
    ),
    Metric(
        "importance_bounded",
        "Share of chosen tokens whose importance weight was truncated or masked.",
        "mean[weight outside its bounds]",
        "near 0",
    ),
    Metric(
        "grad_norm",
        "Global norm of the gradient before clipping.",
        "‖g‖₂",
        "steady; often above max_grad_norm is a sign to lower lr",
    ),
    Metric("lr", "Learning rate in force.", "lr × schedule", "as set"),
    Metric(
        "optimizer_steps",
        "Optimizer steps done in the iteration.",
        "count",
        "passes × minibatches, fewer after a target-KL stop",
    ),
    Metric("refused_steps", "Optimizer steps refused because a loss or gradient was not finite.", "count", "0"),
    Metric(
        "skipped_steps",
        "Optimizer steps skipped because no episode of their minibatch carries weight.",
        "count",
        "0, unless truncated episodes are masked",
    ),
    Metric("stopped_early", "1 if the target KL ended the update.", "flag", "mostly 0"),
    Metric("value_pretraining", "1 while only the value function is trained.", "flag", "as set"),
    Metric("eval/exact", "Share of held-out tasks answered exactly right: the headline.", "mean over tasks", "rises"),
    Metric(
        "eval/*/*",
        "What an environment finds out about the policy by asking it, such as exploitability; in evaluations.",
        "a function of the policy's exact probabilities",
        "the environment's own",
    ),
    Metric("eval/reward", "Mean shaped reward on held-out tasks.", "mean over tasks", "rises"),
)


def describe(name: str) -> Metric | None:
    """The entry for a metric's name, patterns included."""
    if name in METRICS:
        return METRICS[name]
    head, slash, rest = name.partition("/")
    return METRICS.get(f"{head}/*/*" if "/" in rest else f"{head}/*") if slash and rest else None

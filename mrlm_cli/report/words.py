"""Metrics in words: what a value means and what to do about it. Bounds are the good ranges of `mrlm explain`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mrlm_cli.report.text import number

Level = Literal["good", "watch", "bad"]
GOOD: Level = "good"
WATCH: Level = "watch"
BAD: Level = "bad"

EARLY_STEPS = 10  # up to here a value function worse than a constant and many clipped tokens are usual
NEARLY_ALL = 0.95  # of the episodes of an optimizer step, clipped
EARLY_SHARE = 0.2  # of a run in which a policy from scratch may still learn to end its replies
MASTERED = 0.9  # held-out exactness above which a policy that is sure of itself is what was wanted


@dataclass(frozen=True, slots=True)
class Judgement:
    """One metric's value in words."""

    metric: str
    level: Level
    label: str
    value: str
    words: str

    def __str__(self) -> str:
        return f"{self.label} {self.value}: {self.words}"


@dataclass(frozen=True, slots=True)
class _Rule:
    metric: str
    label: str
    bands: tuple[tuple[float, Level, str], ...]  # (up to and including, level, words), ascending
    share: bool = False  # shown in percent
    only_problems: bool = False  # worth no line while it is good


_RULES = (
    _Rule(
        "reward_std",
        "spread of the rewards",
        ((1e-6, WATCH, "all rewards are equal, so there is nothing to learn from"), (math.inf, GOOD, "")),
        only_problems=True,
    ),
    _Rule(
        "failed_rate",
        "failed episodes",
        (
            (0, GOOD, ""),
            (0.5, WATCH, "the environment failed; the stored episodes say why"),
            (1, BAD, "most episodes fail; the stored episodes say why"),
        ),
        share=True,
        only_problems=True,
    ),
    _Rule(
        "excluded_rate",
        "prompts or rows that do not fit",
        (
            (0, GOOD, ""),
            (1, WATCH, "left out; raise max_tokens (in sampling or data) or model.context, or shorten them"),
        ),
        share=True,
        only_problems=True,
    ),
    _Rule(
        "refused_steps",
        "refused optimizer steps",
        ((0, GOOD, ""), (math.inf, BAD, "a loss or gradient was not finite; lower optimizer.lr")),
        only_problems=True,
    ),
    _Rule(
        "approx_kl",
        "KL to old policy",
        (
            (0.05, GOOD, "small, safe"),
            (0.2, WATCH, "large; lower optimizer.lr or passes, or set algorithm.target_kl"),
            (math.inf, BAD, "far too large; lower optimizer.lr or passes, or set algorithm.target_kl"),
        ),
    ),
    _Rule(
        "value_clip_fraction",
        "clipped values",
        ((0.3, GOOD, "few"), (1, WATCH, "many; the value function is held back by value_clip")),
        share=True,
        only_problems=True,
    ),
    _Rule(
        "kl",
        "KL to reference, nats an episode",
        (
            (1, GOOD, "still close to where it began"),
            (20, GOOD, "has moved"),
            (math.inf, WATCH, "far from where it began"),
        ),
    ),
)
_GAP = {
    "float32": ((1e-4, GOOD, "sampler and trainer agree"), (math.inf, WATCH, "sampler and trainer disagree")),
    "bfloat16": ((0.1, GOOD, "usual for bfloat16"), (math.inf, WATCH, "sampler and trainer disagree")),
}


def judge(
    metrics: Mapping[str, float],
    *,
    step: int,
    steps: int = 0,
    precision: str = "float32",
    exact: float | None = None,
    clips_episodes: bool = False,
) -> list[Judgement]:
    """Every metric that words are known for, in a fixed order; absent ones and uninteresting good ones are left out.

    `steps` are those of the whole run, 0 where that is not known.
    `exact` is the last held-out exactness, if any: a policy without entropy is good news when it is right.
    `clips_episodes` is the algorithm's: whole episodes are clipped, which moves many of them out of range, but should
    leave some within it after the first optimizer step of an iteration, in which no ratio has moved yet.
    """
    found = []
    episodes = metrics.get("optimizer_steps", math.inf) if clips_episodes else None
    for rule in (*_RULES, _clipping(step, episodes), *_dependent(step, steps, precision, exact)):
        value = metrics.get(rule.metric)
        if value is None or math.isnan(value):
            continue
        level, words = next(
            ((level, words) for bound, level, words in rule.bands if value <= bound), (BAD, "out of range")
        )
        if level != GOOD or not rule.only_problems:
            shown = f"{value:.0%}" if rule.share and (value == 0 or value >= 0.01) else number(value)
            found.append(Judgement(rule.metric, level, rule.label, shown, words))
    return found


def problems(judgements: list[Judgement]) -> list[Judgement]:
    """Those that are not good, the worst first."""
    return sorted((one for one in judgements if one.level != GOOD), key=lambda one: one.level != BAD)


def _clipping(step: int, episodes: float | None) -> _Rule:
    """What a clip fraction means: of tokens, or of episodes in so many optimizer steps an iteration.

    What is clipped and went the way of its advantage has no gradient, so that a step in which nearly all is clipped
    learns from what went the other way alone.
    """
    early, few = step <= EARLY_STEPS, (0.3, GOOD, "few, the steps are moderate")
    if episodes is None:
        many = (GOOD, "many, as yet; should fall") if early else (WATCH, "many; lower optimizer.lr or passes")
        return _Rule("clip_fraction", "clipped tokens", (few, (1, *many)), share=True)
    usual = (NEARLY_ALL * (1 - 1 / max(episodes, 1)), GOOD, "many, as is usual where whole episodes are clipped")
    all_late = "nearly all after an iteration's first optimizer step, so that the others teach little"
    nearly_all = (
        (GOOD, "nearly all, as yet; should fall")
        if early
        else (WATCH, f"{all_late}; lower optimizer.minibatches, passes or lr, or widen algorithm.clip")
    )
    return _Rule("clip_fraction", "clipped episodes", (few, usual, (1, *nearly_all)), share=True)


def _dependent(step: int, steps: int, precision: str, exact: float | None) -> tuple[_Rule, ...]:
    """The rules whose bounds depend on where the run stands and on what it is."""
    mastered = exact is not None and exact >= MASTERED
    below_constant: tuple[Level, str] = (
        (GOOD, "returns hardly vary any more")
        if mastered
        else (GOOD, "not learnt yet")
        if step <= EARLY_STEPS
        else (WATCH, "worse than a constant; raise value_coef or its lr")
    )
    unending: tuple[Level, str] = (
        (GOOD, "many, as yet; should fall")
        if step <= max(EARLY_STEPS, EARLY_SHARE * steps)
        else (WATCH, "many; reward replies that end, or raise sampling.max_new_tokens or max_turns")
    )
    collapsed: tuple[Level, str] = (
        (GOOD, "sure of itself, and right")
        if mastered
        else (WATCH, "collapsed, exploration is over; raise algorithm.entropy.coef or lower optimizer.lr")
    )
    return (
        _Rule(
            "truncated_rate",
            "replies cut by a limit",
            ((0.05, GOOD, "few"), (0.3, GOOD, "some; should fall"), (1, *unending)),
            share=True,
        ),
        _Rule(
            "entropy", "entropy", ((0.02, *collapsed), (0.3, GOOD, "exploring little"), (math.inf, GOOD, "exploring"))
        ),
        _Rule(
            "explained_variance",
            "value function",
            (
                (-0.5, *below_constant),
                (-1e-6, GOOD, "explains nothing of the returns yet"),
                (0.3, GOOD, "explains little of the returns yet"),
                (0.7, GOOD, "explains part of the returns"),
                (math.inf, GOOD, "explains most of the returns"),
            ),
        ),
        _Rule("sampler_gap", "sampler gap", _GAP[precision]),
    )

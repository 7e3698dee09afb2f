"""What a run tells its listeners: the dashboard, plain lines, files. Listeners change nothing. And what a collection
is asked for and gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mrlm_cli.records import Episode, Split


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95 % interval; the interval resamples tasks."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation, of episodes of environments or of held-out rows of data (which earn no reward)."""

    checkpoint: str
    step: int
    split: str
    tasks: int  # tasks actually evaluated
    failed: int  # episodes that failed for a technical reason, or rows (a pair is one) that do not fit: left out
    reward: Estimate | None
    components: Mapping[str, Estimate]
    pass_at: Mapping[int, float]  # {k: share of tasks with an exact answer among k episodes}; empty for one episode
    length: float  # chosen tokens an episode
    truncated: float  # share of episodes cut by a limit
    seconds: float
    # {"environment" where there are several, and "environment/part" of a mixture: {component: its mean}}
    environments: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    # {"environment/agent": {"reward" or component: its mean}} where an environment has several agents
    agents: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    findings: Mapping[str, float] = field(default_factory=dict)  # {"environment/finding": what it found out}

    @property
    def headline(self) -> tuple[str, Estimate]:
        """What leads: exact, or the accuracy over pairs, where there is one; else the reward; else the loss."""
        for name in ("exact", "accuracy"):
            if name in self.components:
                return name, self.components[name]
        return ("loss", self.components["loss"]) if self.reward is None else ("reward", self.reward)

    @property
    def unit(self) -> str:
        """What was evaluated: tasks, or rows of data."""
        return "tasks" if self.reward is not None else "rows"

    @property
    def fault(self) -> str:
        """What was wrong with the `failed`, in a word."""
        return "failed" if self.reward is not None else "unfit"

    @property
    def score(self) -> float:
        """The headline as a number that is better when it is higher."""
        name, estimate = self.headline
        return -estimate.mean if name == "loss" else estimate.mean

    def to_json(self) -> dict[str, Any]:
        """The JSON-able form that `mrlm eval --json` prints."""
        return asdict(self)


class Listener:
    """Override what you want to hear."""

    def started(self, run: Path, recipe: Any, step: int, parameters: int) -> None:
        """Training begins or goes on at `step`; `recipe` is a Recipe."""

    def phase(self, name: str, done: int, total: int) -> None:
        """What is being done now, and what is awaited: "rollout 128 of 512", "update 3 of 8"; total 0 if unknown."""

    def stepped(self, step: int, metrics: Mapping[str, float], episodes: Sequence[Episode]) -> None:
        """Update number `step` is done."""

    def evaluated(self, evaluation: Evaluation) -> None:
        """A held-out evaluation is done."""

    def saved(self, step: int, path: Path) -> None:
        """A checkpoint is on disk."""

    def warned(self, text: str) -> None:
        """Something a person should know."""

    def finished(self, step: int) -> None:
        """The run came to its last step."""

    def close(self) -> None:
        """Give the terminal back; called once, also after an error."""


Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to collect: the first `tasks` tasks of a split, `samples` episodes of each."""

    tasks: int
    samples: int
    split: Split = "train"
    pairs: bool = False  # preference pairs instead of demonstrations
    component: str | None = None  # demonstrations only: the reward component that `least` speaks of
    least: float | None = None  # demonstrations only: what an episode must have earned


@dataclass(frozen=True, slots=True)
class Collected:
    """Rows for a JSON lines file, and why episodes or tasks gave none, counted."""

    rows: tuple[Row, ...]
    left_out: Mapping[str, int]

    def summary(self, what: str) -> str:
        """One sentence."""
        without = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        return f"{len(self.rows)} {what}" + (f"; left out: {without}" if without else "")

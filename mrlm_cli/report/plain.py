"""Plain lines for logs and pipes: one for a step, at most about one a second; evaluations and checkpoints always."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from mrlm_cli.events import Estimate, Evaluation, Listener
from mrlm_cli.records import Episode
from mrlm_cli.report import words
from mrlm_cli.report.pace import Pace
from mrlm_cli.report.text import duration, printable

_RHYTHM = 1.0  # seconds between step lines
_SILENCE = 30.0  # seconds without a line after which a line says what is awaited
_PHASES = ("rollout", "scoring", "update")
_COLUMNS = (
    ("reward", ".3f"),
    ("loss", ".4f"),
    ("pair_accuracy", ".3f"),
    ("length", ".1f"),
    ("entropy", ".3f"),
    ("approx_kl", ".4f"),
)


class PlainLines(Listener):
    """Writes to `stream`, ASCII except for what others say. If the stream breaks, the lines are lost, not the run."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream: TextIO | None = stream
        self._clock = clock
        self._steps = 0
        self._first = -1  # the step from which it goes on
        self._precision = "float32"
        self._clips_episodes = False
        self._pace = Pace(clock())
        self._begun = clock()
        self._step_line = -_RHYTHM  # when the last step line was written
        self._last_line = clock()
        self._exact: float | None = None
        self._next = ""  # what to do with the run when it is done
        self._told: dict[str, int] = {}  # metric -> step at which its problem was last told

    def started(self, run: Path, recipe: Any, step: int, parameters: int) -> None:
        """See Listener."""
        self._steps, self._first = recipe.steps, step
        self._precision = recipe.hardware.precision
        self._clips_episodes = recipe.algorithm.clips_episodes
        self._begun = self._clock()
        self._pace = Pace(self._begun)
        self._step_line = self._begun - _RHYTHM
        if recipe.data is None:
            self._next = f"; its test tasks: mrlm eval {printable(str(run))}"
        origin = f", from step {step}" if step else ""
        self._write(f"run {printable(str(run))}: {parameters:,} parameters, {recipe.steps} steps{origin}")

    def phase(self, name: str, done: int, total: int) -> None:
        """See Listener; written only when nothing else was for a while."""
        if self._clock() - self._last_line >= _SILENCE:
            self._write(f"  ... {printable(name)}{f' {done} of {total}' if total else ''}")

    def stepped(self, step: int, metrics: Mapping[str, float], episodes: Sequence[Episode]) -> None:
        """See Listener."""
        now = self._clock()
        self._pace.stepped(now)
        if now - self._step_line >= _RHYTHM or step >= self._steps:
            self._step_line = now
            self._write(self._step_text(step, metrics))
        judgements = words.judge(
            metrics,
            step=step,
            steps=self._steps,
            precision=self._precision,
            exact=self._exact,
            clips_episodes=self._clips_episodes,
        )
        for one in words.problems(judgements):
            told = self._told.get(one.metric)
            if told is None or step - told >= max(20, self._steps // 10):
                self._told[one.metric] = step
                self._write(f"note at step {step}: {one}")

    def evaluated(self, evaluation: Evaluation) -> None:
        """See Listener."""
        exact = evaluation.components.get("exact")
        self._exact = None if exact is None else exact.mean
        name, estimate = evaluation.headline
        said = f"{name} {_interval(estimate)} of {evaluation.tasks} held-out {evaluation.unit}"
        if evaluation.reward is not None and name != "reward":
            said += f", reward {evaluation.reward.mean:.2f}"
        if evaluation.reward is None and name != "loss":
            said += f", loss {evaluation.components['loss'].mean:.4g}"
        if evaluation.failed:
            said += f", {evaluation.failed} {evaluation.fault} and left out"
        said += "".join(
            f", {place} {components['exact'].mean:.2f}"
            for place, components in evaluation.environments.items()
            if "exact" in components
        )
        said += "".join(f", {name} {value:.4f}" for name, value in evaluation.findings.items())
        self._write(f"evaluation at step {evaluation.step}: {said}")

    def saved(self, step: int, path: Path) -> None:
        """See Listener."""
        self._write(f"checkpoint of step {step}: {printable(str(path))}")

    def warned(self, text: str) -> None:
        """See Listener."""
        self._write(f"warning: {printable(text)}")

    def finished(self, step: int) -> None:
        """See Listener."""
        if step == self._first:
            self._write(f"nothing to do: all {step} steps were done before; steps=N trains longer")
        else:
            self._write(f"done: step {step} after {duration(self._clock() - self._begun)}{self._next}")

    def _step_text(self, step: int, metrics: Mapping[str, float]) -> str:
        parts = [f"step {step:>{len(str(self._steps))}}/{self._steps}"]
        parts += [f"{name} {metrics[name]:{form}}" for name, form in _COLUMNS if name in metrics]
        seconds = metrics["seconds"]
        shares = (f"{name} {metrics[f'{name}_seconds'] / max(seconds, 1e-9):3.0%}" for name in _PHASES)
        parts.append(f"{seconds:.1f} s ({' '.join(shares)})")
        left = self._pace.left(self._steps - step)
        if left:
            parts.append(f"left {duration(left)}")
        return "  ".join(parts)

    def _write(self, line: str) -> None:
        if self._stream is None:
            return
        encoding = self._stream.encoding or "utf-8"
        try:
            print(line.encode(encoding, "backslashreplace").decode(encoding), file=self._stream, flush=True)
        except (OSError, ValueError):  # the reader of a pipe went away, or the stream was closed: the run goes on
            self._stream = None
        self._last_line = self._clock()


def _interval(estimate: Estimate) -> str:
    return f"{estimate.mean:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"

"""The live view of a training run in a terminal.

Events only write to a state; a thread draws it at most four times a second, and less often where drawing is slow, so
that it takes at most a fiftieth of a core. What breaks in drawing ends the view, never the run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.text import Text

from mrlm_cli.events import Estimate, Evaluation, Listener
from mrlm_cli.records import Episode
from mrlm_cli.report import board
from mrlm_cli.report.history import read_evaluations, read_metrics
from mrlm_cli.report.pace import Pace
from mrlm_cli.report.text import conversation, printable

_PAUSE = 0.25  # seconds between refreshes at least
_SHARE = 0.02  # of a core that drawing may take
_LONGEST_PAUSE = 5.0
_EPISODES = 2


class Dashboard(Listener):
    """Shows a run on `console` from `started` to `close`, which leaves the last picture and the terminal as it was."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._unicode = console.encoding.lower().startswith("utf")
        self._state = board.State()
        self._pace = Pace(time.monotonic())
        self._begun = time.monotonic()
        self._lock = threading.Lock()  # between events and drawing
        self._closing = threading.Event()
        self._live: Live | None = None
        self._thread: threading.Thread | None = None
        self._size = console.size
        self._next = ""  # what to do with the run when it is done

    def started(self, run: Path, recipe: Any, step: int, parameters: int) -> None:
        """See Listener; the view appears."""
        with self._lock:
            state = self._state
            state.name, state.place = self._text(recipe.name), self._text(str(run))
            state.steps, state.step = recipe.steps, step
            if recipe.data is None:
                self._next = f"; its test tasks: mrlm eval {state.place}"
            state.parameters, state.precision = parameters, recipe.hardware.precision
            state.clips_episodes = recipe.algorithm.clips_episodes
            if step:
                self._remember(run)
            self._begun = time.monotonic()
            self._pace = Pace(self._begun)
        self._live = Live(self, console=self._console, auto_refresh=False, transient=False, vertical_overflow="crop")
        self._thread = threading.Thread(target=self._draw, name="mrlm live view", daemon=True)
        self._thread.start()

    def phase(self, name: str, done: int, total: int) -> None:
        """See Listener."""
        self._state.phase = (self._text(name), done, total)

    def stepped(self, step: int, metrics: Mapping[str, float], episodes: Sequence[Episode]) -> None:
        """See Listener."""
        now = time.monotonic()
        shown = [self._shown(one) for one in episodes[-_EPISODES:]]
        with self._lock:
            state = self._state
            state.step, state.metrics, state.episodes = step, dict(metrics), shown
            self._pace.stepped(now)
            state.left = self._pace.left(state.steps - step)
            if "reward" in metrics:
                state.reward.add(step, metrics["reward"])

    def evaluated(self, evaluation: Evaluation) -> None:
        """See Listener."""
        with self._lock:
            self._state.evaluation = evaluation
            self._held_out(evaluation)

    def saved(self, step: int, path: Path) -> None:
        """See Listener."""
        self._state.saved = step

    def warned(self, text: str) -> None:
        """See Listener; before the view appears and after it is gone, the text is printed."""
        if self._live is None:
            with suppress(OSError):  # the terminal is gone; the run goes on
                self._console.print(Text(f"warning: {printable(self._text(text))}", style="yellow"))
        else:
            self._state.warning = self._text(text)

    def finished(self, step: int) -> None:
        """See Listener."""
        self._state.over = f"done: all {step} steps{self._next}"

    def close(self) -> None:
        """See Listener; may be called more than once."""
        if self._thread is None:
            return
        self._closing.set()
        self._thread.join()
        self._thread = None
        if self._live is not None:
            if not self._state.over:
                self._state.over = f"stopped after step {self._state.step}; mrlm resume {self._state.place} goes on"
            try:
                self._live.stop()
            except Exception as error:
                self._give_up(error)
            self._live = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The picture, in the size that the terminal has now."""
        yield from self._picture(options.max_width, console.size.height)

    def _picture(self, width: int, height: int) -> Iterator[Text]:
        with self._lock:
            self._state.elapsed = time.monotonic() - self._begun
            # One row stays free for the cursor; in the last column some terminals wrap.
            found = board.lines(self._state, max(1, width - 1), max(1, height - 1), self._unicode)
        yield from found

    def _draw(self) -> None:
        pause = _PAUSE
        try:
            assert self._live is not None
            self._live.start(refresh=True)
            while not self._closing.wait(pause):
                begun = time.thread_time()
                self._refresh()
                pause = min(_LONGEST_PAUSE, max(_PAUSE, (time.thread_time() - begun) / _SHARE))
        except Exception as error:
            self._give_up(error)

    def _refresh(self) -> None:
        assert self._live is not None
        size = self._console.size
        if size != self._size:
            # The terminal has wrapped the old picture, so that going up by its rows would miss its top.
            self._size = size
            self._console.control(Control(ControlType.CLEAR, ControlType.HOME))
        self._live.refresh()

    def _give_up(self, error: Exception) -> None:
        """End the view for good and say so; metrics, episodes and evaluations stay in the run directory."""
        live, self._live = self._live, None
        # Stopping draws once more, which may fail again; the line below says all there is to say.
        with suppress(Exception):
            if live is not None:
                live.stop()
        with suppress(OSError):
            self._console.show_cursor(True)
            line = f"the live view stopped ({type(error).__name__}: {error}); training goes on, see metrics.jsonl"
            self._console.print(Text(printable(self._text(line)), style="yellow"))

    def _remember(self, run: Path) -> None:
        """Curves from before a resume."""
        try:
            for row in read_metrics(run):
                if "reward" in row:
                    self._state.reward.add(row["step"], row["reward"])
            for one in read_evaluations(run):
                self._state.evaluation = _evaluation(one)
                self._held_out(self._state.evaluation)
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._state.warning = self._text(f"the curves begin here, as earlier steps could not be read: {error}")

    def _shown(self, episode: Episode) -> board.Shown:
        asked, said = conversation(episode)
        return board.Shown(self._text(asked), self._text(said), sum(episode.rewards))

    def _text(self, text: str) -> str:
        """What the terminal's encoding can hold of `text`, the rest escaped."""
        return text if self._unicode else text.encode("ascii", "backslashreplace").decode("ascii")

    def _held_out(self, evaluation: Evaluation) -> None:
        value, falls = evaluation.headline[1].mean, evaluation.headline[0] == "loss"
        self._state.held_out.add(evaluation.step, value)
        best = self._state.best
        if best is None or (value < best[0] if falls else value > best[0]):
            self._state.best = (value, evaluation.step)


def _evaluation(row: Mapping[str, Any]) -> Evaluation:
    """The evaluation of a stored row, as far as the view shows it."""
    return Evaluation(
        checkpoint=row["checkpoint"],
        step=row["step"],
        split=row["split"],
        tasks=row["tasks"],
        failed=row["failed"],
        reward=None if row["reward"] is None else Estimate(**row["reward"]),
        components={name: Estimate(**estimate) for name, estimate in row["components"].items()},
        pass_at={},
        length=row["length"],
        truncated=row["truncated"],
        seconds=row["seconds"],
        findings=row.get("findings", {}),
    )

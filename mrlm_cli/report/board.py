"""What the live view shows: a picture of a run's state in at most so many rows of so many columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.text import Text

from mrlm_cli.events import Evaluation
from mrlm_cli.report import words
from mrlm_cli.report.series import Series, plot
from mrlm_cli.report.text import duration, number, printable, shorten

PHASES = (("rollout", "█", "#", "cyan"), ("scoring", "▓", "=", "magenta"), ("update", "▒", "-", "yellow"))
_STYLES: dict[words.Level, str] = {"good": "green", "watch": "yellow", "bad": "bold red"}
_PLOT_ROWS = 6  # enough to see a curve; more only pushes the episodes out
_LEAST_CURVES = 4  # rows, the title among them; where there are fewer, words say more


@dataclass
class Shown:
    """One episode, ready to be shown."""

    asked: str
    said: str
    reward: float


@dataclass
class State:
    """All that is known of the run; the dashboard writes it, `lines` reads it. For a terminal without Unicode every
    text in it must be ASCII."""

    name: str = ""
    place: str = ""
    steps: int = 0
    step: int = 0
    parameters: int = 0
    precision: str = "float32"
    clips_episodes: bool = False
    phase: tuple[str, int, int] = ("starting", 0, 0)
    elapsed: float = 0.0
    left: float | None = None
    over: str = ""  # set at the end: done, or stopped
    metrics: Mapping[str, float] = field(default_factory=dict)
    reward: Series = field(default_factory=Series)
    held_out: Series = field(default_factory=Series)
    evaluation: Evaluation | None = None
    best: tuple[float, int] | None = None  # (headline, step)
    saved: int | None = None
    warning: str = ""
    episodes: Sequence[Shown] = ()


def lines(state: State, width: int, height: int, unicode: bool = True) -> list[Text]:
    """At most `height` lines, at least one, none wider than `width` cells. What matters less gives way first."""
    judgements = words.judge(
        state.metrics,
        step=state.step,
        steps=state.steps,
        precision=state.precision,
        exact=_last_exact(state.evaluation),
        clips_episodes=state.clips_episodes,
    )
    found_bad = words.problems(judgements)
    sections = {
        "title": [_title(state)],
        "progress": [_progress(state, width, unicode)],
        "phase": [_phase(state)],
        "warning": [Text(f"warning: {printable(state.warning)}", style="yellow")] if state.warning else [],
        "held": [_held_out(state)],
        "health": [_health(found_bad, state)],
        "time": _time(state, width, unicode),
        "episodes": _episodes(state, width, unicode),
        "words": [_judgement(one) for one in (*found_bad[1:], *(one for one in judgements if one.level == words.GOOD))],
    }
    # In the order in which they claim their rows; the curves take what is left, between the headline and the rest.
    chosen: dict[str, list[Text]] = {}
    room = max(1, height)
    for name in ("progress", "phase", "held", "health", "warning", "time", "title", "episodes", "words"):
        part = sections[name]
        if name == "words":
            part = part[: room if room < _LEAST_CURVES else room - _LEAST_CURVES]
        if part and len(part) <= room:
            chosen[name] = part
            room -= len(part)
    rows = min(_PLOT_ROWS, room - 1)
    if rows >= _LEAST_CURVES - 1:
        chosen["curves"] = _curves(state, width, rows, unicode)
    order = ("title", "progress", "phase", "warning", "held", "curves", "health", "words", "time", "episodes")
    found = [line for name in order for line in chosen.get(name, [])]
    for line in found:
        line.no_wrap = True
        line.truncate(width, overflow="ellipsis" if unicode else "crop")
    return found


def _last_exact(evaluation: Evaluation | None) -> float | None:
    if evaluation is None or "exact" not in evaluation.components:
        return None
    return evaluation.components["exact"].mean


def _title(state: State) -> Text:
    title = Text.assemble((printable(state.name), "bold"), (f"  {state.parameters:,} parameters", "dim"))
    title.append(f"  {printable(state.place)}", "dim")
    if state.saved is not None:
        title.append(f"  checkpoint of step {state.saved}", "dim")
    return title


def _progress(state: State, width: int, unicode: bool) -> Text:
    share = state.step / state.steps if state.steps else 0.0
    before = f"step {state.step:>{len(str(state.steps))}}/{state.steps} "
    after = f" {share:4.0%}  {duration(state.elapsed)}"
    if state.left is not None and not state.over:
        after += f"  left {duration(state.left)}"
    room = max(0, width - len(before) - len(after))
    full = int(share * room)
    done, todo = ("━", "─") if unicode else ("=", "-")
    return Text.assemble((before, "bold"), (done * full, "green"), (todo * (room - full), "dim"), after)


def _phase(state: State) -> Text:
    if state.over:
        return Text(printable(state.over), style="bold")
    name, done, total = state.phase
    return Text.assemble("now: ", (printable(name), "bold"), f" {done} of {total}" if total else "")


def _held_out(state: State) -> Text:
    if state.evaluation is None:
        return Text("held out: not evaluated yet", style="dim")
    evaluation = state.evaluation
    name, estimate = evaluation.headline
    text = Text.assemble(
        f"held-out {name} ",
        (f"{estimate.mean:.2f}", "bold green"),
        f" [{estimate.low:.2f}, {estimate.high:.2f}] step {evaluation.step}",
    )
    if state.best is not None:
        text.append(f", best {state.best[0]:.2f} at {state.best[1]}")
    if evaluation.reward is not None and name != "reward":
        text.append(f"  reward {evaluation.reward.mean:.2f}")
    for finding, value in evaluation.findings.items():
        text.append(f"  {printable(finding)} {value:.4f}")
    text.append(f"  {evaluation.tasks} {evaluation.unit}", "dim")
    if evaluation.failed:
        text.append(f"  {evaluation.failed} {evaluation.fault}", "yellow")
    return text


def _health(found_bad: list[words.Judgement], state: State) -> Text:
    """The worst problem, or that there is none."""
    if not state.metrics:
        return Text("health: no step yet", style="dim")
    if not found_bad:
        return Text.assemble("health: ", ("good", "green"))
    return Text.assemble("health: ", (str(found_bad[0]), _STYLES[found_bad[0].level]))


def _judgement(one: words.Judgement) -> Text:
    return Text.assemble("  ", one.label, " ", (one.value, "bold"), ": ", (one.words, _STYLES[one.level]))


def _time(state: State, width: int, unicode: bool) -> list[Text]:
    """A bar of the iteration's phases with their seconds, and the throughput."""
    if "seconds" not in state.metrics:
        return []
    spent = {name: state.metrics[f"{name}_seconds"] for name, *_ in PHASES}
    whole = max(sum(spent.values()), 1e-9)
    room = max(4, min(30, width - 74))
    bar, legend = Text("time "), Text()
    used = 0
    for name, solid, plain, style in PHASES:
        cells = min(room - used, round(spent[name] / whole * room))
        used += cells
        bar.append((solid if unicode else plain) * cells, style)
        legend.append(f"  {name} ", style)
        legend.append(number(spent[name]))
    return [bar + Text(f" {state.metrics['seconds']:.2f} s") + legend + _speed(state.metrics)]


def _speed(metrics: Mapping[str, float]) -> Text:
    speed = metrics.get("tokens_per_second")
    return Text("" if speed is None else f"  {speed:,.0f} tokens/s", style="dim")


def _episodes(state: State, width: int, unicode: bool) -> list[Text]:
    found = []
    gap = "…" if unicode else "~"
    for one in state.episodes:
        reward = number(one.reward)
        room = max(4, width - len(reward) - 12)
        asked = shorten(one.asked, max(2, room * 2 // 5), gap)
        said = shorten(one.said, max(2, room - min(room * 2 // 5, len(asked))), gap)
        found.append(Text.assemble("  ", (asked, "dim"), (" -> ", "dim"), said, (" -> ", "dim"), (reward, "bold")))
    return [Text("last episodes", style="dim"), *found] if found else []


def _curves(state: State, width: int, rows: int, unicode: bool) -> list[Text]:
    """The held-out headline and the training reward, side by side where there is room, else the headline alone."""
    name = state.evaluation.headline[0] if state.evaluation is not None else "exact"
    held_range = (0.0, 1.0) if name in ("exact", "accuracy") else _range(state.held_out)
    held = (f"held-out {name}", state.held_out, held_range, "green")
    reward = ("training reward", state.reward, _range(state.reward), "cyan")
    pictures = [held, reward] if width >= 50 else [held if state.held_out.points else reward]
    each = (width - 2 * (len(pictures) - 1)) // len(pictures)
    made = [_curve(*picture, state.steps, each, rows, unicode) for picture in pictures]
    return [Text("  ").join(row) for row in zip(*made, strict=True)]


def _range(series: Series) -> tuple[float, float]:
    low, high = series.span()
    return (low, high) if high - low > 1e-9 else (low - 0.5, high + 0.5)


def _curve(
    title: str,
    series: Series,
    y_range: tuple[float, float],
    style: str,
    steps: int,
    width: int,
    rows: int,
    unicode: bool,
) -> list[Text]:
    """One curve of exactly `rows` + 1 lines of exactly `width` cells: a title, then the plot with its bounds."""
    bounds = [number(y_range[1]), number(y_range[0])]
    margin = max(map(len, bounds))
    inner = max(1, width - margin - 1)
    drawn = plot(series.points, inner, rows, (0, max(1, steps)), y_range, unicode)
    found = [Text(f"{title[:inner]:>{margin + 1 + len(title[:inner])}}", style="dim")]
    for index, row in enumerate(drawn):
        bound = bounds[0] if index == 0 else bounds[1] if index == rows - 1 else ""
        found.append(Text.assemble((f"{bound:>{margin}} ", "dim"), (row, style)))
    for line in found:
        line.truncate(width, pad=True)
    return found

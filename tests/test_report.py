"""The live view and plain lines: what they say, that they fit, that hostile text and failures do no harm."""

import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from mrlm_cli.events import Estimate, Evaluation
from mrlm_cli.metrics import METRICS
from mrlm_cli.records import Episode, Message, Task, Transcript
from mrlm_cli.report import board, dashboard, words
from mrlm_cli.report.dashboard import Dashboard
from mrlm_cli.report.pace import Pace
from mrlm_cli.report.plain import PlainLines
from mrlm_cli.report.series import Series, plot
from mrlm_cli.report.text import conversation, duration, number, printable, shorten
from tests import kit

HOSTILE = "\x1b[2J\x1b]0;owned\x07[bold red]x[/] \u202eevil\u200b\r\n数é\ud800" + "a\u0301\u0301\u0301\u0301\u0301"
METRIC_VALUES = {
    "seconds": 1.1,
    "rollout_seconds": 0.44,
    "scoring_seconds": 0.11,
    "update_seconds": 0.55,
    "tokens_per_second": 12345.6,
    "reward": 0.47,
    "reward_std": 0.2,
    "length": 6.9,
    "entropy": 1.2,
    "approx_kl": 0.004,
    "clip_fraction": 0.1,
    "explained_variance": 0.5,
    "truncated_rate": 0.02,
    "sampler_gap": 1e-6,
    "failed_rate": 0.0,
}
RECIPE = SimpleNamespace(
    name="quickstart",
    steps=400,
    data=None,
    hardware=SimpleNamespace(precision="float32"),
    algorithm=SimpleNamespace(clips_episodes=False),
)


def episode(asked: str = "sort 750862=", said: str = "025678", reward: float = 0.86) -> Episode:
    task = Task("t", "sort", "train", 0, {})
    view = (Message("system", "be good"), Message("user", asked), Message("assistant", said))
    transcript = Transcript(task, 0, {"policy": view}, (), {}, "done")
    return Episode("e", "s", task, "g", 0, "policy", (1, 2), (), (0.0, 0.0), (0.0, reward), transcript, "done", True)


def evaluation(step: int, exact: float | None, reward: float = 0.85, failed: int = 0) -> Evaluation:
    components = {} if exact is None else {"exact": Estimate(exact, exact - 0.04, exact + 0.04)}
    estimate = Estimate(reward, reward - 0.05, reward + 0.05)
    return Evaluation("c", step, "validation", 500, failed, estimate, components, {}, 6.9, 0.0, 0.3)


# --- text ---------------------------------------------------------------------------------------------------------


def test_durations_and_numbers() -> None:
    assert [duration(s) for s in (-1, 8.4, 130, 3900, 273600)] == ["0s", "8s", "2m10s", "1h05m", "3d04h"]
    shown = {0: "0", 0.47: "0.47", 12.34: "12.3", 0.004: "0.004", 2e-6: "2e-06", 12345.6: "12,346", -0.3: "-0.3"}
    assert {value: number(value) for value in shown} == shown


def test_hostile_text_is_made_harmless() -> None:
    assert printable("a\x1b[2J\x07\u202e\u200b\n\ud800é数") == "a\\x1b[2J\\x07\\u202e\\u200b\\n\\ud800é数"
    assert printable("a" + "\u0301" * 3) == "a\u0301\u0301\\u0301"


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60), st.integers(1, 40))
def test_shortened_text_fits_and_is_safe(text: str, cells: int) -> None:
    shown = shorten(text, cells)
    assert cell_len(shown) <= cells
    assert shown.isprintable()
    whole = printable(text)
    assert shown == whole if cell_len(whole) <= cells else shown != whole


def test_shortened_text_keeps_both_ends() -> None:
    assert shorten("abcdefghij" * 1000, 11) == "abcde…fghij"


def test_an_episode_in_two_parts() -> None:
    assert conversation(episode()) == ("sort 750862=", "025678")


# --- curves -------------------------------------------------------------------------------------------------------


def test_a_line_is_drawn_in_dots() -> None:
    rising = [(0.0, 0.0), (10.0, 1.0)]
    assert plot(rising, 2, 1, (0, 10), (0, 1)) == ["⡠⠊"]
    assert plot([(0.0, 0.0)], 2, 1, (0, 10), (0, 1)) == ["⡀⠀"]
    assert plot([(0.0, 0.0), (5.0, 0.0), (10.0, 1.0)], 3, 2, (0, 10), (0, 1), unicode=False) == ["  *", "** "]
    assert plot([], 3, 1, (0, 5), (0, 1), unicode=False) == ["   "]


def test_a_steep_line_has_no_gap() -> None:
    rows = plot([(0.0, 0.0), (1.0, 0.0), (1.5, 1.0)], 4, 5, (0, 3), (0, 1), unicode=False)
    assert all("*" in row for row in rows)


def test_values_out_of_range_stay_inside() -> None:
    assert plot([(0.0, 9.0), (1.0, -9.0)], 2, 2, (0, 1), (0, 1), unicode=False) == ["* ", " *"]


def test_a_long_series_stays_small_and_keeps_its_mean() -> None:
    series = Series()
    for step in range(1, 8193):
        series.add(step, step % 2)
    assert 256 <= len(series.points) <= 1024
    assert {y for _, y in series.points} == {0.5}
    assert series.points[0][0] < series.points[-1][0] <= 8192
    assert series.span() == (0.5, 0.5)


def test_pace_counts_the_last_steps() -> None:
    pace = Pace(0.0)
    assert pace.left(10) is None
    for step in range(1, 301):
        pace.stepped(step if step <= 200 else 200 + 3 * (step - 200))
    assert pace.left(10) == 30.0


# --- words --------------------------------------------------------------------------------------------------------


def level(name: str, value: float, **context: object) -> str | None:
    found = {one.metric: one for one in words.judge({name: value}, **{"step": 100, **context})}  # type: ignore[arg-type]
    return found[name].level if name in found else None


@pytest.mark.parametrize(
    ("name", "precision", "pattern"),
    [
        ("approx_kl", "float32", r"below ([\d.e-]+)"),
        ("clip_fraction", "float32", r"0 to ([\d.e-]+)"),
        ("value_clip_fraction", "float32", r"0 to ([\d.e-]+)"),
        ("sampler_gap", "float32", r"below ([\d.e-]+) in float32"),
        ("sampler_gap", "bfloat16", r"below ([\d.e-]+) in bfloat16"),
    ],
)
def test_bounds_are_those_that_explain_states(name: str, precision: str, pattern: str) -> None:
    match = re.search(pattern, METRICS[name].good)
    assert match is not None
    bound = float(match[1])
    assert level(name, bound * 0.99, precision=precision) in ("good", None)
    assert level(name, bound * 1.01, precision=precision) == "watch"


def test_every_word_belongs_to_a_metric() -> None:
    dependent = [*words._dependent(0, 0, "float32", None), words._clipping(0, None), words._clipping(0, 4)]
    assert all(rule.metric in METRICS for rule in (*words._RULES, *dependent))


@pytest.mark.parametrize(
    ("share", "step", "optimizer_steps", "expected"),
    [
        (0.2, 50, 4, "good: few, the steps are moderate"),
        (0.7, 50, 4, "good: many, as is usual where whole episodes are clipped"),
        (0.74, 50, 4, "watch: nearly all after an iteration's first optimizer step"),  # of 4 the first clips nothing
        (0.74, 50, 8, "good: many, as is usual where whole episodes are clipped"),
        (0.74, 10, 4, "good: nearly all, as yet; should fall"),
        (0.49, 50, 2, "watch: nearly all after an iteration's first optimizer step"),
        (0.0, 50, 1, "good: few, the steps are moderate"),
    ],
)
def test_clipped_episodes_are_judged_by_the_steps_that_can_clip_any(
    share: float, step: int, optimizer_steps: int, expected: str
) -> None:
    metrics = {"clip_fraction": share, "optimizer_steps": float(optimizer_steps)}
    (one,) = words.judge(metrics, step=step, clips_episodes=True)
    assert (one.label, f"{one.level}: {one.words}".partition("; lower ")[0].partition(", so that")[0]) == (
        "clipped episodes",
        expected,
    )
    (tokens,) = words.judge(metrics, step=step)
    assert (tokens.label, tokens.level) == ("clipped tokens", "watch" if share > 0.3 and step > 10 else "good")


def test_health_problems() -> None:
    assert words.problems(words.judge(METRIC_VALUES, step=100)) == []
    assert level("entropy", 0.01) == "watch"
    assert level("entropy", 0.01, exact=0.95) == "good"
    assert level("explained_variance", -0.7) == "watch"
    assert level("explained_variance", -0.2) == "good"
    assert level("explained_variance", -0.7, step=5) == "good"
    assert level("explained_variance", 0.0) == "good"
    assert level("truncated_rate", 0.6) == "watch"
    assert level("truncated_rate", 0.6, step=5) == "good"
    assert level("truncated_rate", 0.6, step=40, steps=200) == "good"
    assert level("truncated_rate", 0.6, step=41, steps=200) == "watch"
    assert level("clip_fraction", 0.4, step=10) == "good"
    assert level("clip_fraction", 0.4, step=11) == "watch"
    assert level("reward_std", 0.0) == "watch"
    assert level("reward_std", 0.1) is None
    assert level("failed_rate", 0.0) is None
    assert level("failed_rate", 0.1) == "watch"
    assert level("failed_rate", 0.7) == "bad"
    assert level("refused_steps", 1.0) == "bad"
    assert level("excluded_rate", 0.5) == "watch"
    worst_first = words.problems(words.judge({"approx_kl": 0.1, "entropy": 0.0, "failed_rate": 0.9}, step=50))
    assert [one.metric for one in worst_first] == ["failed_rate", "approx_kl", "entropy"]
    assert str(words.judge({"approx_kl": 0.004}, step=1)[0]) == "KL to old policy 0.004: small, safe"
    assert str(words.judge({"failed_rate": 0.004}, step=1)[0]).startswith("failed episodes 0.004:")


# --- the picture --------------------------------------------------------------------------------------------------


def state(hostile: bool = False) -> board.State:
    text = HOSTILE if hostile else ""
    found = board.State(
        name="quickstart" + text,
        place="runs/quickstart" + text,
        steps=400,
        step=40,
        parameters=336128,
        phase=("rollout: sampling" + text, 128, 512),
        elapsed=45.0,
        left=130.0,
        metrics=METRIC_VALUES,
        evaluation=evaluation(50, 0.31),
        best=(0.31, 50),
        warning=text,
        episodes=[board.Shown("sort 750862=" + text, "025678" + text, 0.86), board.Shown(text, text, -1e9)],
    )
    for step in range(41):
        found.reward.add(step, step / 40)
    found.held_out.add(0, 0.0)
    found.held_out.add(50, 0.31)
    return found


def test_the_picture_in_a_usual_terminal() -> None:
    shown = [line.plain.rstrip() for line in board.lines(state(), 100, 30)]
    assert shown[0] == "quickstart  336,128 parameters  runs/quickstart"
    assert shown[1].startswith("step  40/400 ━━━━━━─")
    assert shown[1].endswith("─  10%  45s  left 2m10s")
    assert cell_len(shown[1]) == 100
    assert shown[2] == "now: rollout: sampling 128 of 512"
    assert shown[3] == "held-out exact 0.31 [0.27, 0.35] step 50, best 0.31 at 50  reward 0.85  500 tasks"
    assert "held-out exact" in shown[4]
    assert "training reward" in shown[4]
    assert shown[5].startswith("1 ")
    assert shown[10].startswith("0 ⡠")
    assert shown[11:] == [
        "health: good",
        "  KL to old policy 0.004: small, safe",
        "  clipped tokens 10%: few, the steps are moderate",
        "  replies cut by a limit 2%: few",
        "  entropy 1.2: exploring",
        "  value function 0.5: explains part of the returns",
        "  sampler gap 1e-06: sampler and trainer agree",
        "time ██████████▓▓▓▒▒▒▒▒▒▒▒▒▒▒▒▒ 1.10 s  rollout 0.44  scoring 0.11  update 0.55  12,346 tokens/s",
        "last episodes",
        "  sort 750862= -> 025678 -> 0.86",
        "   ->  -> -1,000,000,000",
    ]


def test_the_picture_in_a_narrow_terminal() -> None:
    shown = [line.plain.rstrip() for line in board.lines(state(), 60, 16)]
    assert "held-out exact 0.31 [0.27, 0.35] step 50, best 0.31 at 50" in shown[3]
    assert any(line.endswith("update 0.55") or "update 0.55 " in line for line in shown)
    assert sum("⠀" in line for line in shown) >= 3  # the curves are there
    assert len(shown) == 16


def test_without_an_exact_component_the_reward_leads() -> None:
    one = state()
    one.evaluation = evaluation(50, None, reward=0.6, failed=3)
    text = "\n".join(line.plain for line in board.lines(one, 100, 30))
    assert "held-out reward 0.60 [0.55, 0.65] step 50" in text
    assert "3 failed" in text
    assert "held-out exact" not in text


def test_problems_lead_the_health_line() -> None:
    one = state()
    one.metrics = {**METRIC_VALUES, "explained_variance": -0.7, "refused_steps": 2}
    shown = [line.plain.rstrip() for line in board.lines(one, 100, 30)]
    place = shown.index("health: refused optimizer steps 2: a loss or gradient was not finite; lower optimizer.lr")
    assert shown[place + 1] == "  value function -0.7: worse than a constant; raise value_coef or its lr"


@pytest.mark.parametrize("hostile", [False, True])
@pytest.mark.parametrize("unicode", [False, True])
def test_the_picture_fits_every_terminal(hostile: bool, unicode: bool) -> None:
    for one in (state(hostile), board.State()):
        for width in (1, 2, 5, 10, 20, 33, 49, 50, 60, 80, 200):
            for height in (1, 2, 3, 5, 8, 12, 16, 24, 60):
                found = board.lines(one, width, height, unicode)
                assert 1 <= len(found) <= height
                for line in found:
                    assert cell_len(line.plain) <= width, (width, height, line.plain)
                    assert line.plain.isprintable()
                    assert unicode or hostile or line.plain.isascii()


# --- plain lines --------------------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def plain() -> tuple[PlainLines, io.StringIO, Clock]:
    stream, clock = io.StringIO(), Clock()
    return PlainLines(stream, clock), stream, clock


def test_plain_lines(plain: tuple[PlainLines, io.StringIO, Clock]) -> None:
    listener, stream, clock = plain
    listener.started(Path("runs/quickstart"), RECIPE, 0, 336128)
    for step in range(1, 41):
        clock.now += 1.1
        listener.stepped(step, METRIC_VALUES, [])
    listener.evaluated(evaluation(50, 0.31))
    listener.evaluated(evaluation(60, None, failed=2))
    listener.saved(50, Path("runs/quickstart/checkpoints/step-000050"))
    listener.warned("odd \x1b[2J")
    clock.now += 100
    listener.phase("rollout: waiting for judge", 3, 64)
    listener.finished(400)
    listener.close()
    shown = stream.getvalue().splitlines()
    assert shown[0] == "run runs/quickstart: 336,128 parameters, 400 steps"
    assert shown[1].startswith("step   1/400  reward 0.470")
    assert shown[40] == (
        "step  40/400  reward 0.470  length 6.9  entropy 1.200  approx_kl 0.0040  "
        "1.1 s (rollout 40% scoring 10% update 50%)  left 6m36s"
    )
    assert shown[41:] == [
        "evaluation at step 50: exact 0.31 [0.27, 0.35] of 500 held-out tasks, reward 0.85",
        "evaluation at step 60: reward 0.85 [0.80, 0.90] of 500 held-out tasks, 2 failed and left out",
        "checkpoint of step 50: runs/quickstart/checkpoints/step-000050",
        "warning: odd \\x1b[2J",
        "  ... rollout: waiting for judge 3 of 64",
        "done: step 400 after 2m24s; its test tasks: mrlm eval runs/quickstart",
    ]


def test_a_run_that_was_done_says_so(plain: tuple[PlainLines, io.StringIO, Clock]) -> None:
    listener, stream, _ = plain
    listener.started(Path("r"), RECIPE, 400, 1)
    listener.finished(400)
    assert stream.getvalue().endswith("nothing to do: all 400 steps were done before; steps=N trains longer\n")


def test_fast_steps_give_one_line_a_second_and_the_last_one(plain: tuple[PlainLines, io.StringIO, Clock]) -> None:
    listener, stream, clock = plain
    listener.started(Path("r"), RECIPE, 0, 1)
    for step in range(1, 401):
        clock.now += 0.0625
        listener.stepped(step, METRIC_VALUES, [])
        listener.phase("update", 1, 2)
    steps = [int(line.split("/")[0].split()[1]) for line in stream.getvalue().splitlines() if line.startswith("step ")]
    assert steps == [*range(1, 400, 16), 400]


def test_a_problem_is_told_but_not_at_every_step(plain: tuple[PlainLines, io.StringIO, Clock]) -> None:
    listener, stream, _ = plain
    listener.started(Path("r"), RECIPE, 0, 1)
    for step in range(1, 100):
        listener.stepped(step, {**METRIC_VALUES, "approx_kl": 0.1}, [])
    notes = [line for line in stream.getvalue().splitlines() if line.startswith("note")]
    assert [line.split(":")[0] for line in notes] == [f"note at step {n}" for n in (1, 41, 81)]
    assert "KL to old policy 0.1: large" in notes[0]


@pytest.mark.parametrize(("algorithm", "noted"), [("ppo", True), ("grpo", True), ("gspo", False), ("rloo", False)])
def test_clipped_tokens_are_no_problem_where_whole_episodes_are_clipped(
    plain: tuple[PlainLines, io.StringIO, Clock], algorithm: str, noted: bool
) -> None:
    listener, stream, _ = plain
    recipe = SimpleNamespace(**{**vars(RECIPE), "algorithm": kit.settings("algorithms", type=algorithm)})
    listener.started(Path("r"), recipe, 0, 1)
    for step in range(1, 21):
        listener.stepped(step, {**METRIC_VALUES, "clip_fraction": 0.5}, [])
    assert ("note at step 11: clipped tokens 50%: many; lower" in stream.getvalue()) == noted


def test_a_closed_pipe_does_not_stop_the_run() -> None:
    class Pipe(io.StringIO):
        writes = 0

        def write(self, text: str) -> int:
            self.writes += 1
            raise BrokenPipeError

    pipe = Pipe()
    listener = PlainLines(pipe)
    listener.started(Path("r"), RECIPE, 0, 1)
    listener.stepped(1, METRIC_VALUES, [])
    assert pipe.writes == 1


def test_a_terminal_without_unicode_gets_escapes() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    PlainLines(stream).warned("数")
    assert raw.getvalue() == b"warning: \\u6570\n"


# --- the live view ------------------------------------------------------------------------------------------------


def terminal(width: int = 100, height: int = 30) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    console = Console(
        file=stream, force_terminal=True, width=width, height=height, color_system="standard", _environ={}
    )
    return console, stream


def final_picture(text: str) -> list[str]:
    """The lines after the last time that the cursor went up, without styles."""
    last = text.rsplit("\x1b[1A", 1)[-1]
    return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).rstrip() for line in last.splitlines()]


def test_a_whole_run_in_the_live_view() -> None:
    console, stream = terminal()
    view = Dashboard(console)
    view.warned("early [red]x[/red] \x1b[2J")
    view.started(Path("runs/quickstart"), RECIPE, 0, 336128)
    view.evaluated(evaluation(0, 0.04))
    for step in range(1, 5):
        view.phase("rollout: sampling", 0, 512)
        view.stepped(step, METRIC_VALUES, [episode(), episode(HOSTILE, HOSTILE, 0.5)])
        time.sleep(0.1)
    view.evaluated(evaluation(4, 0.31))
    view.saved(4, Path("c"))
    view.warned(HOSTILE)
    view.finished(400)
    view.close()
    view.close()
    text = stream.getvalue()
    assert "early [red]x[/red] \\x1b[2J" in text
    assert "\x1b[2J" not in text
    assert "\x07" not in text
    assert "\u202e" not in text
    assert text.index("\x1b[?25l") < text.rindex("\x1b[?25h")  # the cursor is back
    assert text.rindex("\x1b[?25l") < text.rindex("\x1b[?25h")
    shown = final_picture(text)
    assert "done: all 400 steps; its test tasks: mrlm eval runs/quickstart" in shown
    assert "held-out exact 0.31 [0.27, 0.35] step 4, best 0.31 at 4  reward 0.85  500 tasks" in shown
    assert "  sort 750862= -> 025678 -> 0.86" in shown
    assert any(
        line.startswith("quickstart  336,128 parameters  runs/quickstart  checkpoint of step 4") for line in shown
    )


def test_a_run_that_ends_early_says_how_to_go_on() -> None:
    console, stream = terminal()
    view = Dashboard(console)
    view.started(Path("runs/toy"), RECIPE, 0, 1)
    view.stepped(1, METRIC_VALUES, [])
    view.close()
    assert "stopped after step 1; mrlm resume runs/toy goes on" in final_picture(stream.getvalue())


def test_a_live_view_without_unicode() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    view = Dashboard(Console(file=stream, force_terminal=True, width=80, height=30, _environ={}))
    view.started(Path("runs/数"), RECIPE, 0, 1)
    view.stepped(1, METRIC_VALUES, [episode("é", HOSTILE), episode("数" * 99, "é")])
    view.phase("数", 1, 2)
    view.warned(HOSTILE)
    view.close()
    text = raw.getvalue().decode("ascii")
    assert "live view stopped" not in text
    assert "\\u6570" in text


def test_closing_before_the_start_is_fine() -> None:
    console, stream = terminal()
    Dashboard(console).close()
    assert stream.getvalue() == ""


@pytest.mark.parametrize("moment", ["first", "later"])
def test_a_failure_in_drawing_ends_the_view_only(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    console, stream = terminal()
    view = Dashboard(console)
    draw = board.lines
    broken = moment == "first"

    def lines(*arguments: object) -> object:
        if broken:
            raise KeyError("no such [metric]")
        return draw(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(board, "lines", lines)
    monkeypatch.setattr(dashboard, "_PAUSE", 0.01)
    view.started(Path("r"), RECIPE, 0, 1)
    time.sleep(0.1)
    broken = True
    deadline = time.monotonic() + 10
    while "training goes on" not in stream.getvalue() and time.monotonic() < deadline:
        time.sleep(0.01)
    view.stepped(1, METRIC_VALUES, [])
    view.warned("late")
    view.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "the live view stopped (KeyError: 'no such [metric]'); training goes on" in text
    assert "warning: late" in text
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")


def test_slow_drawing_is_done_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that takes 20 ms of a core is drawn once a second, not four times."""
    console, _ = terminal()
    drawn = 0

    def lines(*arguments: object) -> list[object]:
        nonlocal drawn
        drawn += 1
        begun = time.thread_time()
        while time.thread_time() - begun < 0.02:
            pass
        return []

    monkeypatch.setattr(board, "lines", lines)
    view = Dashboard(console)
    view.started(Path("r"), RECIPE, 0, 1)
    time.sleep(1.5)
    before_close = drawn
    view.close()
    assert 1 <= before_close <= 3  # at the start, after 0.25 s, after another second


def test_a_resumed_run_shows_its_earlier_curves(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    rows = [{"step": step, "reward": step / 10} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "re')
    for step, exact in ((0, 0.1), (2, 0.8), (3, 0.5)):
        data = {**evaluation(step, exact).to_json(), "episodes": []}
        (tmp_path / "eval" / f"step-{step:06d}.json").write_text(json.dumps(data))
    test_split = {**evaluation(3, 0.99).to_json(), "split": "test"}
    (tmp_path / "eval" / "step-000003-test.json").write_text(json.dumps(test_split))
    console, stream = terminal()
    view = Dashboard(console)
    view.started(tmp_path, RECIPE, 3, 1)
    assert view._state.reward.points == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert view._state.held_out.points == [(0, 0.1), (2, 0.8), (3, 0.5)]
    view.close()
    text = "\n".join(final_picture(stream.getvalue()))
    assert "held-out exact 0.50 [0.46, 0.54] step 3, best 0.80 at 2" in text


def test_unreadable_earlier_curves_are_said(tmp_path: Path) -> None:
    console, stream = terminal(200)
    view = Dashboard(console)
    view.started(tmp_path, RECIPE, 3, 1)
    view.close()
    assert "warning: the curves begin here" in "\n".join(final_picture(stream.getvalue()))


def test_a_resize_clears_the_wrapped_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    console, stream = terminal()
    monkeypatch.setattr(dashboard, "_PAUSE", 0.01)
    view = Dashboard(console)
    view.started(Path("r"), RECIPE, 0, 1)
    time.sleep(0.05)
    assert "\x1b[2J" not in stream.getvalue()
    console.size = (60, 12)  # type: ignore[assignment]
    deadline = time.monotonic() + 10
    while "\x1b[2J" not in stream.getvalue() and time.monotonic() < deadline:
        time.sleep(0.01)
    view.close()
    assert stream.getvalue().count("\x1b[2J") == 1
    assert all(cell_len(line) < 60 for line in final_picture(stream.getvalue()))


def test_reports_need_no_torch() -> None:
    code = "import sys, mrlm_cli.report.dashboard, mrlm_cli.report.plain; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"

"""What the live view, the metrics and the stored episodes cost of a step. Prints a table and one JSON line.

    python -m tests.benchmarks.overhead
    python -m tests.benchmarks.overhead --recipe guess_ppo --steps 40

Two ways to see it. The same run with everything and with nothing of it, alternately in blocks of steps: seconds of a
step. And the seconds spent inside each part, by a clock around it (the drawing thread: its CPU time), as a share of
the steps with everything: far less noisy, and it says where the time goes. The live view draws to a terminal of
120 x 40 that nobody sees.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mrlm_cli import api
from mrlm_cli.events import Listener
from mrlm_cli.report.dashboard import Dashboard
from mrlm_cli.training import loop, summary
from mrlm_cli.training.announce import Announcer
from mrlm_cli.training.rundir import RunDirectory
from mrlm_cli.training.stage import Stage, settled
from mrlm_cli.training.stopping import Stopper
from mrlm_cli.training.trainer import Trainer
from tests.benchmarks.common import markdown, seconds


class Costs:
    """Seconds inside each part, while `on`; while it is off the parts do nothing at all."""

    def __init__(self) -> None:
        self.on = True
        self.spent: dict[str, float] = defaultdict(float)

    def around(self, name: str, work: Callable[..., Any], nothing: Callable[..., Any]) -> Callable[..., Any]:
        """`work` with a clock around it, or `nothing`."""

        def called(*given: Any) -> Any:
            if not self.on:
                return nothing(*given)
            begun = time.perf_counter()
            try:
                return work(*given)
            finally:
                self.spent[name] += time.perf_counter() - begun

        return called


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--steps", type=int, default=40, help="counted steps of each kind")
    parser.add_argument("--block", type=int, default=10, help="steps in a row of one kind; the first is not counted")
    arguments, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments, overrides, Path(folder))
    rows = [[name, taken, f"{share:.2%}"] for name, (taken, share) in found["parts"].items()]
    print(markdown(("part", "milliseconds a step", "share of a step"), rows))
    print(f"seconds of a step: {found['with']:.4f} with everything, {found['without']:.4f} with nothing of it")
    print(json.dumps({"benchmark": "overhead", **vars(arguments), **found}))


def measure(arguments: argparse.Namespace, overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """{"with", "without": median seconds of a step; "parts": {name: (milliseconds a step, share)}}."""
    composed = api.load_recipe(arguments.recipe, overrides)
    recipe = settled(composed.recipe, composed.folders)
    run = RunDirectory.create(folder / "run", recipe_yaml="", origins={}, machine={})
    costs = Costs()
    with (folder / "screen").open("w", encoding="utf-8") as screen:
        view = Dashboard(Console(file=screen, force_terminal=True, width=120, height=40))
        told = Announcer([view])
        announce = Told(told, costs)
        with (
            Stopper() as stopper,
            Stage(recipe, composed.folders, journal=run.journal, check=stopper.check, phase=announce.phase) as stage,
            run.lock(),
        ):
            trainer = Trainer(recipe, composed.folders, stage, run, announce)  # type: ignore[arg-type]
            _clocks(trainer, run, view, costs)
            trainer.refresh_engine()
            told.started(run.path, recipe, 0, sum(each.numel() for each in trainer.policy.parameters()))
            taken = _alternate(trainer, arguments, costs)
        told.close()
    everything = statistics.median(taken[True])
    steps = len(taken[True]) / (arguments.block - 1) * arguments.block  # clocks run in the uncounted steps too
    parts = {name: (1000 * spent / steps, spent / steps / everything) for name, spent in sorted(costs.spent.items())}
    parts["all"] = (sum(each for each, _ in parts.values()), sum(share for _, share in parts.values()))
    return {"with": everything, "without": statistics.median(taken[False]), "parts": parts}


class Told(Listener):
    """The run's announcer: everything goes to the listeners while the costs are on."""

    def __init__(self, listeners: Announcer, costs: Costs) -> None:
        def silent(*given: Any) -> None:
            return None

        self.phase = costs.around("live view: events", listeners.phase, silent)  # type: ignore[method-assign]
        self.stepped = costs.around("live view: events", listeners.stepped, silent)  # type: ignore[method-assign]
        self.warned = listeners.warned  # type: ignore[method-assign]


def _clocks(trainer: Trainer, run: RunDirectory, view: Dashboard, costs: Costs) -> None:
    def count_only(step: int, metrics: Any) -> None:
        run._steps = step

    run.append_metrics = costs.around(  # type: ignore[method-assign]
        "metrics: the line on the disk", run.append_metrics, count_only
    )
    run.write_episodes = costs.around(  # type: ignore[method-assign]
        "stored episodes: the file", run.write_episodes, lambda *given: None
    )
    loop.stored = costs.around("stored episodes: rows", summary.stored, lambda *given: [])  # type: ignore[attr-defined]
    # What a step's line must hold for the loop itself is made in both kinds of steps; its cost is counted in one.
    loop.episode_metrics = costs.around(  # type: ignore[attr-defined]
        "metrics: of the episodes", summary.episode_metrics, summary.episode_metrics
    )
    refresh = view._refresh

    def drawn() -> None:
        if costs.on:
            begun = time.thread_time()
            refresh()
            costs.spent["live view: drawing"] += time.thread_time() - begun

    view._refresh = drawn  # type: ignore[method-assign]


def _alternate(trainer: Trainer, arguments: argparse.Namespace, costs: Costs) -> dict[bool, list[float]]:
    taken: dict[bool, list[float]] = {True: [], False: []}
    loop.iteration(trainer)  # warms up
    costs.spent.clear()
    while len(taken[False]) < arguments.steps:
        for costs.on in (True, False):
            for number in range(arguments.block):
                spent = seconds(lambda: loop.iteration(trainer))
                if number:
                    taken[costs.on].append(spent)
    return taken


if __name__ == "__main__":
    main()

"""From the shell to the first optimizer step of a recipe, phase by phase. Prints a table and one JSON line.

    python -m tests.benchmarks.cold_start
    python -m tests.benchmarks.cold_start --recipe quickstart --rounds 5 engine.slots=256

Every round is a process of its own that runs `mrlm train` as a person would, up to the end of its first optimizer
step; the median over the rounds is quoted. Evaluation 0 is timed and not counted. What lies on the disk has been read
by a first round that is not counted: a first start after booting also waits for the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NOT_COUNTED = "evaluation 0"
Marks = list[tuple[str, float, float]]  # (phase that has ended, wall clock, CPU seconds of the process so far)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--spawned", type=float, help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args()
    if arguments.child is not None:
        child(arguments.recipe, overrides, arguments.child, arguments.spawned)
        return
    found = [one_start(arguments.recipe, overrides) for _ in range(arguments.rounds + 1)][1:]
    phases = {
        name: {kind: round(statistics.median(each[name][kind] for each in found), 3) for kind in ("seconds", "cpu")}
        for name in found[0]
    }
    total = {kind: round(statistics.median(counted(each, kind) for each in found), 3) for kind in ("seconds", "cpu")}
    print(f"{'phase':32} {'seconds':>8} {'CPU s':>8}")
    for name, taken in phases.items():
        print(
            f"{name + (' (not counted)' if name == NOT_COUNTED else ''):32} {taken['seconds']:8.2f} {taken['cpu']:8.2f}"
        )
    print(f"{'to the first optimizer step':32} {total['seconds']:8.2f} {total['cpu']:8.2f}")
    print(json.dumps({"benchmark": "cold_start", "recipe": arguments.recipe, **total, "phases": phases}))


def counted(phases: Mapping[str, Mapping[str, float]], kind: str) -> float:
    """Seconds of one start without evaluation 0."""
    return sum(taken[kind] for name, taken in phases.items() if name != NOT_COUNTED)


def one_start(recipe: str, overrides: Sequence[str]) -> dict[str, dict[str, float]]:
    """{phase: {"seconds", "cpu"}} of one process. Raises SystemExit with its output if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "marks.json"
        command = [sys.executable, __file__, "--recipe", recipe, "--child", str(place)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(
            [*command, "--spawned", repr(time.monotonic()), *overrides],
            capture_output=True,
            text=True,
            cwd=folder,
            env=environment,
            check=False,
        )
        if not place.exists():
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        marks = json.loads(place.read_text())
    phases: dict[str, dict[str, float]] = {}
    for (_, began, cpu_before), (name, ended, cpu) in pairwise(marks):
        phases[name] = {"seconds": ended - began, "cpu": cpu - cpu_before}
    return phases


def child(recipe: str, overrides: Sequence[str], place: Path, spawned: float) -> None:
    """Run the command, noting when each phase ends, and end the process after the first optimizer step."""
    marks: Marks = [("", spawned, 0.0)]

    def mark(phase: str) -> None:
        marks.append((phase, time.monotonic(), time.process_time()))

    mark("interpreter")
    from mrlm_cli import api
    from mrlm_cli.cli.app import main as command
    from mrlm_cli.events import Evaluation, Listener

    mark("command line")

    class Watch(Listener):
        """Sees the first steps of a run."""

        def started(self, run: Path, recipe: Any, step: int, parameters: int) -> None:
            mark("model, run directory")

        def evaluated(self, evaluation: Evaluation) -> None:
            mark(NOT_COUNTED)

        def phase(self, name: str, done: int, total: int) -> None:
            if name == "scoring" and marks[-1][0] == NOT_COUNTED:
                mark("rollout")
            elif name == "update" and done == 0:
                mark("scoring" if marks[-1][0] == "rollout" else "rollout")
            elif name == "update":
                finish()

        def stepped(self, step: int, metrics: Mapping[str, float], episodes: Sequence[Any]) -> None:
            finish()

    def finish() -> None:
        mark("first optimizer step")
        place.write_text(json.dumps(marks))
        os._exit(0)  # nothing of the run is wanted any more

    build, read, listeners = api._run, api.load_recipe, api._listeners

    def recipe_read(*given: Any) -> Any:
        composed = read(*given)
        mark("recipe")
        return composed

    def imported(*given: Any) -> None:
        mark("imports")
        build(*given)

    api.load_recipe, api._run = recipe_read, imported
    api._listeners = lambda plain: [*listeners(plain), Watch()]
    sys.exit(command(["train", recipe, *overrides]))


if __name__ == "__main__":
    main()

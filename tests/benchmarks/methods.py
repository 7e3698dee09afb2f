"""PPO, GRPO, RLOO and REINFORCE++ from one supervised start, with equal episodes: the table of recipes/README.md.

    python tests/benchmarks/methods.py FOLDER

Each method's learning rate is the one of RATES with the best exactness on the validation split, of one run each with
seed 0; the chosen ones are run with three other seeds and judged on test tasks, greedily, beside a run of those in
CONTROLS whose rewards are shuffled among the episodes of a step. Everything is kept in FOLDER, and runs that are there
are not repeated; table.json holds the numbers. One thread.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mrlm_cli.report.plain import PlainLines
from tests.benchmarks.judging import Answers, Run, answers, difference, last_evaluation, pooled, shown, trained
from tests.benchmarks.shuffled_control import control

START = "sort_sft"
METHODS = {"sort_ppo": "PPO", "sort_grpo": "GRPO", "sort_rloo": "RLOO", "sort_reinforce": "REINFORCE++"}
RATES = (1e-4, 3e-4, 1e-3)
SEEDS = (1, 2, 3)
CONTROLS = ("sort_ppo",)  # what is shuffled is the reward, whatever the method
TASKS = 240
THREADS = "hardware.threads=1"


def settings(rate: float, seed: int) -> list[str]:
    """Overrides of one run."""
    return [f"optimizer.lr={rate}", f"seed={seed}", f"model.path=runs/{START}", THREADS]


def chosen(recipe: str, runs: Path) -> tuple[float, dict[str, float]]:
    """The learning rate that is best on the validation split, and what each came to there."""
    found = {}
    for rate in RATES:
        run = trained(recipe, runs / f"{recipe}-{rate:g}-0", settings(rate, 0))
        found[rate] = last_evaluation(run.path)
    return max(found, key=found.__getitem__), {f"{rate:g}": exact for rate, (exact, _) in found.items()}


def shuffled(recipe: str, rate: float, place: Path) -> float | None:
    """Exactness on the validation split after a run of seed 1 whose rewards are shuffled; None without a control."""
    if recipe not in CONTROLS:
        return None
    note = place / f"{recipe}-shuffled.json"
    if not note.is_file():
        found = control(place / f"{recipe}-shuffled", recipe, settings(rate, 1), PlainLines(sys.stdout))
        note.write_text(json.dumps(found[-1].components["exact"].mean), encoding="utf-8")
    value: float = json.loads(note.read_text(encoding="utf-8"))
    return value


def main(folder: Path) -> None:
    """Print the table as markdown, and write it as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)  # where the recipes find runs/
    runs = Path("runs")
    start = trained(START, runs / START, [THREADS])
    before = answers(start.path, "sort_ppo", TASKS)
    rows = [
        "| method | learning rate | sampled tokens | CPU seconds | exact, seeds 1, 2, 3 | exact, pooled | gain, paired "
        "| rewards shuffled |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        f"| start (supervised) | | 0 | {start.seconds:.0f} | | {shown(pooled([before]))} | | |",
    ]
    table: dict[str, Any] = {"start": asdict(pooled([before])), "tasks": TASKS, "methods": {}}
    for recipe, name in METHODS.items():
        rate, grid = chosen(recipe, runs)
        made: list[Run] = [trained(recipe, runs / f"{recipe}-{rate:g}-{seed}", settings(rate, seed)) for seed in SEEDS]
        after: list[Answers] = [answers(run.path, recipe, TASKS) for run in made]
        gain, whole, noise = difference(after, before), pooled(after), shuffled(recipe, rate, folder)
        means = [pooled([one]).mean for one in after]
        tokens = sum(run.tokens for run in made) / len(made)
        seconds = max(run.seconds for run in made)
        rows.append(
            f"| {name} | {rate:g} | {tokens:,.0f} | {seconds:.0f} | {', '.join(f'{mean:.3f}' for mean in means)} "
            f"| {shown(whole)} | {shown(gain, '+')} | {'' if noise is None else f'{noise:.3f}'} |"
        )
        table["methods"][name] = {
            "rate": rate,
            "validation": grid,
            "tokens": [run.tokens for run in made],
            "seconds": [run.seconds for run in made],
            "exact": means,
            "pooled": asdict(whole),
            "gain": asdict(gain),
            "shuffled": noise,
        }
        Path("table.json").write_text(json.dumps(table, indent=1), encoding="utf-8")  # a broken one tells of the rest
    print("\n".join(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())

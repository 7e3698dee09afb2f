"""DPO and a reward model on pairs that a policy wrote itself, judged by the true reward: see recipes/README.md.

    python tests/benchmarks/preferences.py FOLDER

The start is sort_sft; its answers to training tasks make the pairs. DPO with three seeds, and PPO against the reward
model with one, are judged on test tasks, greedily, by the environment's `exact`. Everything is kept in FOLDER, and runs
that are there are not repeated; preferences.json holds the numbers. One thread.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mrlm_cli import api
from mrlm_cli.events import Wanted
from tests.benchmarks.judging import Run, answers, difference, pooled, shown, trained

START = "sort_sft"
PAIRS = Wanted(tasks=3000, samples=8, split="train", pairs=True, component=None, least=None)
SEEDS = {"sort_dpo": (1, 2, 3), "sort_reward_ppo": (1,)}
TASKS = 1000
THREADS = "hardware.threads=1"


def collected(start: Run, file: Path) -> str:
    """Write the pairs of the start's answers; what came of them, in words."""
    note = file.with_suffix(".txt")
    if not note.is_file():
        found = api.collect(str(start.path), PAIRS, recipe="sort_ppo", overrides=[THREADS])
        file.write_text("".join(json.dumps(row) + "\n" for row in found.rows), encoding="utf-8")
        note.write_text(found.summary("pairs"), encoding="utf-8")
    return note.read_text(encoding="utf-8")


def main(folder: Path) -> None:
    """Print what was measured, and write it as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)  # where the recipes find runs/
    runs = Path("runs")
    start = trained(START, runs / START, [THREADS])
    print(collected(start, runs / "sort_pairs.jsonl"))
    before = answers(start.path, "sort_ppo", TASKS)
    model = trained("sort_reward_model", runs / "sort_reward_model", [THREADS])
    judged = api.evaluate(str(model.path))
    rows = [
        f"reward model, {judged.tasks} test pairs: accuracy {shown(judged.components['accuracy'])}, "
        f"the longer answer {shown(judged.components['longer'])}, {model.seconds:.0f} CPU seconds",
        "| recipe | CPU seconds | exact, by seed | exact, pooled | gain, paired |",
        "| --- | --- | --- | --- | --- |",
        f"| start | {start.seconds:.0f} | | {shown(pooled([before]))} | |",
    ]
    table: dict[str, Any] = {
        "start": asdict(pooled([before])),
        "reward_model": {name: asdict(found) for name, found in judged.components.items()},
        "pairs": judged.tasks,
    }
    for recipe, seeds in SEEDS.items():
        made = [trained(recipe, runs / f"{recipe}-{seed}", [f"seed={seed}", THREADS]) for seed in seeds]
        after = [answers(run.path, "sort_ppo", TASKS) for run in made]
        means = ", ".join(f"{pooled([one]).mean:.3f}" for one in after)
        seconds = max(run.seconds for run in made)
        whole, gain = pooled(after), difference(after, before)
        rows.append(f"| {recipe} | {seconds:.0f} | {means} | {shown(whole)} | {shown(gain, '+')} |")
        table[recipe] = {"exact": means, "pooled": asdict(whole), "gain": asdict(gain), "seconds": seconds}
    Path("preferences.json").write_text(json.dumps(table, indent=1), encoding="utf-8")
    print("\n".join(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())

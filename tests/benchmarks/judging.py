"""What the benchmarks that train have in common: one run with its cost, and a model's answers to held-out tasks."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mrlm_cli import api
from mrlm_cli.envs.host import NoJournal
from mrlm_cli.events import Estimate
from mrlm_cli.recipe.sections import PretrainedModel
from mrlm_cli.training.collect import EXACT
from mrlm_cli.training.evaluate import component_sums, evaluate
from mrlm_cli.training.held_out import ratio
from mrlm_cli.training.stage import Stage, settled

Answers = Mapping[str, float]  # test task → share of its episodes that are exactly right


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run."""

    path: Path
    tokens: int  # sampled in training
    seconds: float  # of this process's CPU time, evaluations included


def trained(recipe: str, path: Path, overrides: Sequence[str] = ()) -> Run:
    """Train a recipe into `path`; a run that came to its end before is read, a broken one begun again."""
    note = path.parent / f"{path.name}.json"
    if not note.is_file():
        shutil.rmtree(path, ignore_errors=True)
        begun = time.process_time()
        api.train(api.load_recipe(recipe, overrides), run_dir=path, plain=True)
        note.write_text(json.dumps({"seconds": time.process_time() - begun}), encoding="utf-8")
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    tokens = round(sum(row["sampled_tokens"] for row in rows))
    return Run(path, tokens, json.loads(note.read_text(encoding="utf-8"))["seconds"])


def last_evaluation(path: Path) -> tuple[float, float]:
    """(exact, reward) of a run's last evaluation on the validation split."""
    found = json.loads(max((path / "eval").glob("step-??????.json")).read_text(encoding="utf-8"))
    return found["components"][EXACT]["mean"], found["reward"]["mean"]


def answers(model: Path, recipe: str, tasks: int) -> Answers:
    """Greedy answers of a run's policy to the first test tasks of a recipe's environments; read where they are kept."""
    note = model.parent / f"{model.name}-{tasks}-answers.json"
    if note.is_file():
        kept: dict[str, float] = json.loads(note.read_text(encoding="utf-8"))
        return kept
    composed = api.load_recipe(recipe, [f"evaluate.tasks={tasks}", "evaluate.temperature=0", "hardware.threads=1"])
    section = PretrainedModel(type="pretrained", path=str(model), chat=composed.recipe.model.chat)
    judged = settled(composed.recipe.model_copy(update={"model": section, "rewards": ()}))
    with Stage(
        judged, composed.folders, journal=NoJournal(), check=lambda: None, phase=lambda *told: None, values=False
    ) as stage:
        stage.engine.load(stage.policy.lm)
        _, episodes = evaluate(
            stage.rollout(bootstrap=False),
            stage.environments,
            judged.evaluate,
            split="test",
            seed=judged.seed,
            step=0,
            checkpoint=str(model),
        )
    found = {one.task.id: component_sums(one)[EXACT] for one in episodes}
    note.write_text(json.dumps(found), encoding="utf-8")
    return found


def pooled(runs: Sequence[Answers]) -> Estimate:
    """Mean over tasks and runs, with an interval that resamples tasks."""
    return ratio([sum(run[task] for run in runs) for task in runs[0]], [len(runs)] * len(runs[0]), EXACT, 0)


def difference(after: Sequence[Answers], before: Answers) -> Estimate:
    """Mean over tasks of what the runs gained on the same tasks, with an interval that resamples tasks."""
    gained = [sum(run[task] - before[task] for run in after) for task in before]
    return ratio(gained, [len(after)] * len(before), "difference", 0)


def shown(found: Estimate, sign: str = "") -> str:
    """`0.82 [0.77, 0.87]`."""
    return f"{found.mean:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"

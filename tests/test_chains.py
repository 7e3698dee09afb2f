"""Chains of runs: a resume on data, a run that starts from another one, a reward model as scorer and as critic."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mrlm_cli.envs.host import NoJournal
from mrlm_cli.errors import CheckpointError, UserError
from mrlm_cli.policy import load
from mrlm_cli.policy.scorer import Scorer
from mrlm_cli.records import Message, Task, Transcript
from mrlm_cli.rewards.base import Failure
from mrlm_cli.rewards.conformance import problems
from mrlm_cli.rewards.reward_model import RewardModel
from mrlm_cli.training.collate import collate
from mrlm_cli.training.dataset import DatasetSource
from mrlm_cli.training.held_out import of_checkpoint
from mrlm_cli.training.loop import iteration, run
from mrlm_cli.training.stage import Stage, settled
from mrlm_cli.training.stopping import Stopper
from tests.data_helpers import chats, go_back, last_values, pair_row
from tests.kit import tiny, trainer
from tests.test_data_algorithms import recipe
from tests.test_resume import timeless

ALGORITHMS: list[dict[str, Any]] = [
    {"type": "sft", "observation_weight": 0.5},
    {"type": "dpo"},
    {"type": "reward_model"},
]


def digests(directory: Path) -> dict[str, str]:
    files = [path for path in directory.rglob("*") if path.suffix == ".safetensors" or path.name == "state.json"]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda each: each["type"])
def test_a_resumed_run_on_data_ends_with_the_same_bits(tmp_path: Path, algorithm: dict[str, Any]) -> None:
    changes: dict[str, Any] = {
        "steps": 9,  # rows for five: the resume comes in the second epoch
        "checkpoint": {"every": 1, "keep": 9},
        "evaluate": {"every": 2, "tasks": 8},
        "data": {"validation_share": 0.1},
        "optimizer": {"lr": 1e-2, "schedule": "linear", "passes": 2, "minibatches": 2, "tokens_per_micro_batch": 64},
    }
    with trainer(tmp_path / "whole", recipe(tmp_path, algorithm, **changes)) as made:
        run(made, Stopper())
        expected = [timeless(row) for row in made.run.metrics()]
    with trainer(tmp_path / "resumed", recipe(tmp_path, algorithm, **changes)) as made:
        go_back(made, tmp_path / "whole", 6)
        run(made, Stopper())
        assert [timeless(row) for row in made.run.metrics()] == expected
    last = "checkpoints/step-000009"
    assert digests(tmp_path / "resumed" / last) == digests(tmp_path / "whole" / last)
    for step in (8, 9):
        one, other = (
            timeless({**json.loads((tmp_path / name / f"eval/step-{step:06}.json").read_text()), "checkpoint": ""})
            for name in ("whole", "resumed")
        )
        assert one == other


def learnt(folder: Path, algorithm: dict[str, Any], name: str, **changes: Any) -> Path:
    """A run that has moved away from its start."""
    moved: dict[str, Any] = {"steps": 3, "optimizer": {"lr": 1e-2, "tokens_per_micro_batch": 512}}
    with trainer(folder / name, recipe(folder, algorithm, **{**moved, **changes})) as made:
        run(made, Stopper())
    return folder / name


def test_a_checkpoint_is_judged_against_no_other_start_than_its_own(tmp_path: Path) -> None:
    data = {"validation_share": 0.2}
    start = learnt(tmp_path, {"type": "sft"}, "start", data=data)

    def judged(point: Path) -> Any:
        model = {"type": "pretrained", "path": str(point / "checkpoints/latest/policy")}
        made = settled(recipe(tmp_path, {"type": "dpo"}, model=model, data=data))
        with Stage(
            made, (tmp_path,), journal=NoJournal(), check=lambda: None, phase=lambda name, done, total: None
        ) as stage:
            return of_checkpoint(stage, made, (tmp_path,), tmp_path / "pairs/checkpoints/step-000003")[0]

    model = {"type": "pretrained", "path": str(start / "checkpoints/latest/policy")}
    learnt(tmp_path, {"type": "dpo"}, "pairs", model=model, data=data)
    assert judged(start).components["margin"].mean != 0
    with pytest.raises(CheckpointError, match="has changed since; its margins would be others"):
        judged(tmp_path / "pairs")


@pytest.mark.parametrize("point", ["run", "checkpoint", "policy"])
def test_a_run_starts_from_another_with_no_distance_to_it(tmp_path: Path, point: str) -> None:
    start = learnt(tmp_path, {"type": "sft"}, "start")
    path = {"run": start, "checkpoint": start / "checkpoints/latest", "policy": start / "checkpoints/latest/policy"}
    model = {"type": "pretrained", "path": str(path[point])}
    with trainer(start.parent / "scratch", tiny()) as made:
        fresh = made.policy.lm.get_input_embeddings().weight.clone()
    with trainer(tmp_path / "ppo", tiny(model=model, algorithm={"type": "ppo", "kl": {"coef": 0.1}})) as made:
        assert not torch.equal(made.policy.lm.get_input_embeddings().weight, fresh)
        iteration(made)
        iteration(made)
        first, second = made.run.metrics()
    assert first["kl"] == 0
    assert second["kl"] != 0
    changes = {"model": model, "optimizer": {"lr": 1e-2, "tokens_per_micro_batch": 512}}
    with trainer(tmp_path / "dpo", recipe(tmp_path, {"type": "dpo"}, **changes)) as made:
        iteration(made)
        iteration(made)
        first, second = made.run.metrics()
    assert abs(first["pair_margin"]) < 1e-5
    assert abs(first["preferred_reward"]) < 1e-5
    assert abs(second["pair_margin"]) > 1e-3


@pytest.mark.parametrize("value", [{"head": "mlp"}, {"type": "separate"}], ids=["shared", "separate"])
def test_a_reward_model_scores_transcripts_and_is_a_critic(tmp_path: Path, value: dict[str, Any]) -> None:
    model = {"value": value, "type": "scratch"}
    path = learnt(tmp_path, {"type": "reward_model"}, "scores", model=model)
    with trainer(tmp_path / "again", recipe(tmp_path, {"type": "reward_model"}, model=model)) as made:
        load.load_weights(made.policy, path / "checkpoints/latest")
        assert isinstance(made.source, DatasetSource)
        episodes, _, expected = last_values(made)
        transcripts = [one.transcript for one in episodes]
    scorer = Scorer(str(path), budget=100)
    found = scorer.score(transcripts)
    assert found == pytest.approx(expected, abs=1e-5)
    assert max(found) - min(found) > 1e-3
    assert scorer.score(transcripts[3:4]) == pytest.approx(found[3:4], abs=1e-5)
    with pytest.raises(UserError, match="is a run of sft"):
        Scorer(str(learnt(tmp_path, {"type": "sft"}, "other")))
    critic = {"type": "separate", "path": str(path), "head": value.get("head", "linear")}
    start = {"type": "pretrained", "path": str(path), "value": critic}
    with trainer(tmp_path / "ppo", tiny(model=start, sampling={"tasks_per_step": 4})) as made:
        batch = collate(episodes, "cpu")
        assert batch is not None
        out = made.policy(batch.tokens, batch.lengths, batch.mask, temperature=1.0)
        assert out.final_values is not None
        assert out.final_values.tolist() == pytest.approx(expected, abs=1e-5)
        iteration(made)
        assert made.run.metrics()[0]["optimizer_steps"] == 1


def test_a_reward_model_pays_the_episodes_of_an_environment(tmp_path: Path) -> None:
    path = learnt(tmp_path, {"type": "reward_model"}, "scores")
    rewards = [{"type": "reward_model", "path": str(path), "weight": 2.0}]
    changes = {"sampling": {"tasks_per_step": 6}, "hardware": {"threads": 1, "device": "cpu", "worker_processes": 1}}
    with trainer(tmp_path / "ppo", tiny(rewards=rewards, **changes)) as made:
        episodes = made.source.episodes(0)
        plain = [sum(value for _, _, name, value in one.transcript.rewards if name == "match") for one in episodes]
        scores = Scorer(str(path)).score([one.transcript for one in episodes])
    assert [sum(one.rewards) for one in episodes] == pytest.approx(
        [match + 2 * score for match, score in zip(plain, scores, strict=True)], abs=1e-5
    )
    assert max(scores) > min(scores)
    with (
        pytest.raises(UserError, match="there is no reward model"),
        trainer(tmp_path / "none", tiny(rewards=[{"type": "reward_model", "path": "nowhere"}])),
    ):
        pass


def test_a_changed_reward_model_is_noticed_on_resume(tmp_path: Path) -> None:
    path = learnt(tmp_path, {"type": "reward_model"}, "scores", checkpoint={"every": 1, "keep": 9})
    rewards = [{"type": "reward_model", "path": str(path), "name": "taste"}]
    changes = {"sampling": {"tasks_per_step": 4}, "hardware": {"threads": 1, "device": "cpu", "worker_processes": 1}}
    with trainer(tmp_path / "ppo", tiny(rewards=rewards, **changes)) as made:
        made.save()
        point = tmp_path / "ppo/checkpoints/step-000000"
        made.load(point)
    newest = max((path / "checkpoints").glob("step-*"))
    shutil.rmtree(newest)  # the run means another checkpoint now, as if the reward model had been trained again
    with (
        trainer(tmp_path / "later", tiny(rewards=rewards, **changes)) as made,
        pytest.raises(CheckpointError, match="the model of the reward taste has changed since"),
    ):
        made.load(point)


def test_a_reward_model_with_a_critic_of_another_shape_stands_alone(tmp_path: Path) -> None:
    """The critic began at another model, which is not needed once the reward model is saved."""
    model = {"layers": 2, "hidden": 48, "heads": 4}
    wide = learnt(tmp_path, {"type": "sft"}, "wide", model=model)
    value = {"type": "separate", "path": str(wide), "head": "mlp"}
    path = learnt(tmp_path, {"type": "reward_model"}, "scores", model={"value": value, "type": "scratch"})
    with trainer(tmp_path / "again", recipe(tmp_path, {"type": "reward_model"}, model={"value": value})) as made:
        load.load_weights(made.policy, path / "checkpoints/latest")
        assert isinstance(made.source, DatasetSource)
        episodes, batch, expected = last_values(made)
        transcripts = [one.transcript for one in episodes]
    shutil.rmtree(wide)
    assert Scorer(str(path)).score(transcripts) == pytest.approx(expected, abs=1e-5)
    start = {"type": "pretrained", "path": str(path), "value": {**value, "path": str(path)}}
    with trainer(tmp_path / "ppo", tiny(model=start, sampling={"tasks_per_step": 4})) as made:
        out = made.policy(batch.tokens, batch.lengths, batch.mask, temperature=1.0)
        assert out.final_values is not None
        assert out.final_values.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_reward_model_keeps_its_word(tmp_path: Path) -> None:
    path = str(learnt(tmp_path, {"type": "reward_model"}, "scores"))
    reward = RewardModel(RewardModel.Config(type="reward_model", path=path))
    reward.prepare()
    view = (Message("user", "sort 21="), Message("assistant", "12"))
    task = Task("0", "e", "train", 0, {})
    one = Transcript(task, 0, {"policy": view, "silent": view[:1]}, (), {}, "done")
    other = replace(one, views={"policy": (*view[:1], Message("assistant", "21"))})
    found = [each for each in problems(reward, [one, other]) if "more than the reward model can see" not in each]
    assert found == []
    (outcome,) = reward.score([one])
    assert isinstance(outcome, dict)
    assert set(outcome) == {"policy"}
    (outcome,) = reward.score([replace(one, views={"policy": (Message("user", "1" * 99), view[1])})])
    assert isinstance(outcome, Failure)
    assert "more than the reward model can see" in outcome.text


def test_rows_of_every_chain_hold_out_the_same_prompts(tmp_path: Path) -> None:
    held = []
    for name, row, algorithm in (("a", None, {"type": "sft"}), ("b", pair_row, {"type": "dpo"})):
        data = {"type": "jsonl", "path": str(chats(tmp_path / f"{name}.jsonl", 60, *([row] if row else [])))}
        forms = {"form": "pairs"} if row else {}
        with trainer(tmp_path / name, tiny(algorithm=algorithm, data={**data, **forms}, seed=len(name) + 7)) as made:
            assert isinstance(made.source, DatasetSource)
            held.append({one.transcript.views["policy"][0].content for one in made.source.held_out(60)})
    assert held[0] == held[1] != set()

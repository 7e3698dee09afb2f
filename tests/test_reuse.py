"""The sampler's log-probs as the old ones: only in float32, only while the measured gap allows it, and nothing lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mrlm_cli.events import Listener
from mrlm_cli.policy import load
from mrlm_cli.records import Batch, Completion, Progress
from mrlm_cli.training import checkpoint, loop
from mrlm_cli.training.annotate import annotate
from mrlm_cli.training.collate import collate
from mrlm_cli.training.trainer import Trainer
from tests.kit import tiny, trainer

LIMIT = 1e-3
SAMPLING = {"tasks_per_step": 6, "episodes_per_task": 2, "max_new_tokens": 5, "reuse_within": LIMIT}


class Heard(Listener):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warned(self, text: str) -> None:
        self.warnings.append(text)


def recipe(algorithm: str = "ppo", **changes: Any) -> Any:
    fields = {"algorithm": {"type": algorithm}, "sampling": SAMPLING, "steps": 4, **changes}
    return tiny(**fields)


def watch(made: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each iteration reused, in order."""
    found: list[bool] = []
    update = made.updater.update

    def seen(batch: Batch, progress: Any, *, measures_gap: bool = False) -> Any:
        found.append(measures_gap)
        assert batch.old_logprobs is not None
        assert torch.equal(batch.old_logprobs, batch.logprobs) == measures_gap
        return update(batch, progress, measures_gap=measures_gap)

    monkeypatch.setattr(made.updater, "update", seen)
    return found


def rows(made: Trainer) -> list[dict[str, Any]]:
    return made.run.metrics()


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_after_a_first_scored_step_the_samplers_are_used_and_the_gap_is_still_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    ends = {}
    for name, limit in (("reused", LIMIT), ("scored", 0.0)):
        changes: Any = {"sampling": {**SAMPLING, "reuse_within": limit}, "optimizer": {"minibatches": 2}}
        with trainer(tmp_path / name, recipe(algorithm, **changes)) as made:
            found = watch(made, monkeypatch)
            for _ in range(3):
                loop.iteration(made)
            assert found == [False, limit > 0, limit > 0]
            assert all(0 < row["sampler_gap"] <= row["sampler_gap_max"] < 1e-4 for row in rows(made))
            ends[name] = torch.cat([each.detach().flatten() for each in made.policy.parameters()])
    assert not torch.equal(ends["reused"], ends["scored"])
    assert torch.allclose(ends["reused"], ends["scored"], atol=1e-4)


def test_bfloat16_is_always_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = {"threads": 1, "device": "cpu", "precision": "bfloat16"}
    with trainer(tmp_path / "run", recipe(hardware=hardware, sampling={**SAMPLING, "reuse_within": 0.1})) as made:
        found = watch(made, monkeypatch)
        for _ in range(2):
            loop.iteration(made)
    assert found == [False, False]


def test_a_gap_above_the_limit_is_told_and_scored_anew_until_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Heard()
    with trainer(tmp_path / "run", recipe(steps=6), heard) as made:
        found = watch(made, monkeypatch)
        generate, wrong = made.engine.generate, [0.0, 0.05, 0.05, 0.0, 0.0]

        def off(requests: Any) -> list[Completion]:
            by = wrong[made.step]
            return [
                replace(one, logprobs=tuple(logprob - by for logprob in one.logprobs)) for one in generate(requests)
            ]

        monkeypatch.setattr(made.engine, "generate", off)
        for _ in wrong:
            loop.iteration(made)
        # The gap of a reused step is seen in its update, so one step is trained on what the sampler said.
        assert found == [False, True, False, False, True]
        assert [round(row["sampler_gap_max"], 3) for row in rows(made)] == [0.0, 0.05, 0.05, 0.0, 0.0]
    assert [text for text in heard.warnings if "reuse_within" in text] == [
        "step 2: a log-prob of the sampler is 0.05 nats from the trainer's, more than sampling.reuse_within = 0.001: "
        "the old ones are the trainer's until it is less"
    ]


@pytest.mark.parametrize("value", ["shared", "separate"])
def test_values_are_those_of_a_full_scoring_and_no_head_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    model = {**tiny().model.model_dump(), "value": {"type": value, "init": "normal"}}
    with trainer(tmp_path / "run", recipe(model=model)) as made:
        batch = collate(made.source.episodes(0), "cpu")
        assert batch is not None
        given: dict[str, Any] = {"temperature": 1.0, "budget": 64, "phase": lambda *_: None}
        scored, gaps = annotate(batch, made.policy, None, made.needs, **given)
        assert gaps
        monkeypatch.setattr(type(made.policy), "head", None)
        if value == "separate":
            monkeypatch.setattr(type(made.policy.lm), "base_model", None)
        reused, gaps = annotate(batch, made.policy, None, made.needs, **given, old_from="sampler")
    assert gaps.means() == {}
    assert reused.values is not None
    assert scored.values is not None
    assert scored.values.abs().max() > 0
    assert torch.equal(reused.values, scored.values)
    assert torch.equal(reused.final_values, scored.final_values)  # type: ignore[arg-type]


def test_a_resume_goes_on_reusing_with_the_same_bits(tmp_path: Path) -> None:
    with trainer(tmp_path / "whole", recipe()) as made:
        for _ in range(2):
            loop.iteration(made)
        made.save()
        for _ in range(2):
            loop.iteration(made)
        expected = load.fingerprint(made.policy)
    with trainer(tmp_path / "again", recipe()) as made:
        made.load(tmp_path / "whole/checkpoints/step-000002")
        made.refresh_engine()
        made.run._steps = 2
        for _ in range(2):
            assert made.old_logprobs_from([], Progress(made.step, 4)) == "sampler"
            loop.iteration(made)
        assert load.fingerprint(made.policy) == expected


def test_a_checkpoint_of_before_there_was_a_gap_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with trainer(tmp_path / "run", recipe()) as made:
        for _ in range(2):
            loop.iteration(made)
        made.save()
        older = checkpoint.state(tmp_path / "run/checkpoints/step-000002")
        assert older.pop("sampler_gap_max") is not None
        assert older.pop("rewards_sha256") == {}
        monkeypatch.setattr(checkpoint, "state", lambda directory: older)
        made.load(tmp_path / "run/checkpoints/step-000002")
        assert made.step == 2
        assert made.old_logprobs_from([], Progress(made.step, 4)) == "scoring"


SINGLE = {"passes": 1, "minibatches": 1, "tokens_per_micro_batch": 64}
LOSS_KL = {"type": "grpo", "kl": {"coef": 0.05}}
PAIRS = {"tasks_per_step": 6, "episodes_per_task": 2, "max_new_tokens": 5}


@pytest.mark.parametrize(
    ("algorithm", "optimizer", "expected"),
    [
        (LOSS_KL, SINGLE, "update"),
        (LOSS_KL, {**SINGLE, "passes": 2}, "scoring"),
        (LOSS_KL, {**SINGLE, "minibatches": 2}, "scoring"),
        ({"type": "rloo"}, SINGLE, "scoring"),  # its KL is credited
        ({"type": "rloo", "kl": {"coef": 0}}, SINGLE, "update"),
        ({"type": "grpo", "importance": {}}, SINGLE, "scoring"),
        ({"type": "ppo"}, SINGLE, "scoring"),  # values are needed anyway
        ({"type": "dpo"}, {**SINGLE, "minibatches": 2}, "update"),  # which has no use for them
    ],
)
def test_a_single_optimizer_step_needs_no_scoring_unless_something_asks_before_it(
    tmp_path: Path, algorithm: Any, optimizer: Any, expected: str
) -> None:
    with trainer(tmp_path / "run", tiny(algorithm=algorithm, optimizer=optimizer, sampling=PAIRS)) as made:
        assert made.old_logprobs_from([], Progress(0, 4)) == expected


def test_what_the_update_takes_for_old_is_what_scoring_would_have_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same parameters and metrics, without a forward of the policy before the update."""
    ends, metrics = {}, {}
    for name in ("update", "scoring"):
        with trainer(tmp_path / name, tiny(algorithm=LOSS_KL, optimizer=SINGLE, sampling=PAIRS, steps=3)) as made:
            monkeypatch.setattr(made, "old_logprobs_from", lambda *_, name=name: name)
            for _ in range(3):
                loop.iteration(made)
            ends[name] = torch.cat([each.detach().flatten() for each in made.policy.parameters()])
            metrics[name] = rows(made)
    assert torch.allclose(ends["update"], ends["scoring"], atol=1e-6)
    for ours, theirs in zip(metrics["update"], metrics["scoring"], strict=True):
        assert ours["grad_norm"] > 0
        for key in ("sampler_gap", "sampler_gap_max", "kl", "grad_norm", "policy_loss", "approx_kl"):
            assert ours[key] == pytest.approx(theirs[key], abs=1e-6, rel=1e-4), key
    assert max(row["sampler_gap_max"] for row in metrics["update"]) < 1e-4
    assert metrics["update"][2]["kl"] != 0

"""Algorithms on data: losses against slow float64 references, what gradients depend on, learning, held-out numbers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mrlm_cli import formulas, registry
from mrlm_cli.algorithms.pairs import pairs
from mrlm_cli.records import Batch, PolicyOut, Progress
from mrlm_cli.training.collate import collate
from mrlm_cli.training.held_out import ratio
from mrlm_cli.training.loop import iteration, run
from mrlm_cli.training.stopping import Stopper
from mrlm_cli.training.trainer import Trainer
from tests.data_helpers import chats, pair_row, two_turns
from tests.kit import settings, tiny, trainer
from tests.ppo_helpers import make_batch
from tests.test_training_update import distance, gradient, padded

START = Progress(0, 3)
SFT = [
    {},
    {"observation_weight": 0.5},
    {"reply_weight": 0.0, "observation_weight": 2.0},
    {"observation_weight": 0.5, "aggregation": "sequence"},
]
DPO = [
    {},
    {"beta": 0.5, "label_smoothing": 0.2},
    {"loss": "ipo", "beta": 0.3},
    {"loss": "ipo", "length_normalised": True},
    {"loss": "hinge", "beta": 0.7},
    {"reference_free": True, "length_normalised": True, "beta": 2.0},
]
ALL = [
    *({"type": "sft", **each} for each in SFT),
    *({"type": "dpo", **each} for each in DPO),
    {"type": "reward_model", "centre": 0.1},
]


def recipe(folder: Path, algorithm: dict[str, Any], **changes: Any) -> Any:
    pairs = algorithm["type"] != "sft"
    path = chats(folder / "rows.jsonl", 30, pair_row if pairs else two_turns)
    data = {"type": "jsonl", "path": str(path), "form": "pairs" if pairs else "chat", "rows_per_step": 6}
    return tiny(**{"algorithm": algorithm, "data": {**data, **changes.pop("data", {})}, **changes})


def credited(made: Trainer) -> Batch:
    """A batch of rows, the reference's log-probs random, ready for an update."""
    needs = made.algorithm.needs
    batch = collate(made.source.episodes(0), "cpu", pairs=needs.pairs, observed=needs.observed)
    assert batch is not None
    noise = -torch.rand(batch.mask.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = batch.replace(
        ref_logprobs=noise * batch.mask, rewards=batch.rewards.double(), weights=batch.weights.double()
    )
    return made.algorithm.credit(batch.replace(mass=batch.mass.double()), START)[0]


@pytest.mark.parametrize("algorithm", ALL, ids=lambda each: " ".join(map(str, each.values())))
def test_gradient_depends_on_neither_micro_batch_nor_order_nor_padding(
    tmp_path: Path, algorithm: dict[str, Any]
) -> None:
    with trainer(tmp_path / "run", recipe(tmp_path, algorithm, model={"value": {"init": "normal"}})) as made:
        batch = credited(made)
        made.policy.to(torch.float64)
        assert len(set(batch.lengths.tolist())) > 1, "the test needs ragged rows"
        whole = gradient(made, batch, 10**6)
        assert float(whole.norm()) > 1e-3
        assert distance(gradient(made, batch, 1), whole) < 1e-10
        assert distance(gradient(made, batch, 70), whole) < 1e-10
        rows = len(batch.lengths)
        order = torch.tensor([(5 * row + 3) % rows for row in range(rows)])
        assert math.gcd(5, rows) == 1
        assert distance(gradient(made, batch.rows(order), 90), whole) < 1e-10
        assert distance(gradient(made, padded(batch, 7), 10**6), whole) < 1e-10


def outputs(batch: Batch) -> PolicyOut:
    generator = torch.Generator().manual_seed(3)
    logprobs = -torch.rand(batch.mask.shape, generator=generator, dtype=torch.float64) * 3
    final = torch.randn(len(batch.lengths), generator=generator, dtype=torch.float64)
    return PolicyOut(logprobs * batch.score, torch.zeros(()), None, final)


@pytest.mark.parametrize("fields", SFT, ids=str)
def test_sft_is_the_weighted_mean_of_the_log_probs_of_its_spans(tmp_path: Path, fields: dict[str, Any]) -> None:
    with trainer(tmp_path / "run", recipe(tmp_path, {"type": "sft", **fields})) as made:
        batch = credited(made)
        out = outputs(batch)
        parts, metrics = made.algorithm.loss(out, batch, START)
        found = float(parts["mass"] / batch.mass.sum())
        weight = {"chosen": fields.get("reply_weight", 1.0), "observation": fields.get("observation_weight", 0.0)}
        over, under = [], []
        for row, one in enumerate(_same(made)):
            spans = [span for span in one.spans if span.kind in weight]
            terms = [
                (weight[span.kind], -float(out.logprobs[row, t])) for span in spans for t in range(span.start, span.end)
            ]
            over.append(math.fsum(w * x for w, x in terms))
            under.append(math.fsum(w for w, _ in terms))
    if fields.get("aggregation") == "sequence":
        expected = math.fsum(a / b for a, b in zip(over, under, strict=True)) / len(over)
    else:
        expected = math.fsum(over) / math.fsum(under)
    assert found == pytest.approx(expected, abs=1e-12)
    assert metrics.means()["loss"] == pytest.approx(expected, abs=1e-6)
    judged = made.algorithm.judge(out, batch)  # type: ignore[attr-defined]
    sums, counts = judged["loss"]
    assert float(sums.sum() / counts.sum()) == pytest.approx(expected, abs=1e-12)


def _same(made: Trainer) -> list[Any]:
    """The episodes of step 0, drawn again."""
    made.source.load_state({**made.source.state(), "cursor": 0})
    return made.source.episodes(0)


def by_hand(fields: dict[str, Any], margin: float) -> float:
    beta = fields.get("beta", 0.1)
    if fields.get("loss") == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    if fields.get("loss") == "hinge":
        return max(0.0, 1 - beta * margin)
    swapped = fields.get("label_smoothing", 0.0)
    return (1 - swapped) * math.log1p(math.exp(-beta * margin)) + swapped * math.log1p(math.exp(beta * margin))


@pytest.mark.parametrize("fields", DPO, ids=str)
def test_dpo_is_its_formula_over_pairs(tmp_path: Path, fields: dict[str, Any]) -> None:
    with trainer(tmp_path / "run", recipe(tmp_path, {"type": "dpo", **fields})) as made:
        batch = credited(made)
        out = outputs(batch)
        parts, metrics = made.algorithm.loss(out, batch, START)
        episodes = _same(made)
    assert batch.ref_logprobs is not None
    score: dict[tuple[str, int], float] = {}
    for row, one in enumerate(episodes):
        terms = [
            float(out.logprobs[row, t]) - (0.0 if fields.get("reference_free") else float(batch.ref_logprobs[row, t]))
            for t in one.chosen
        ]
        score[one.group, one.sample] = math.fsum(terms) / (len(terms) if fields.get("length_normalised") else 1)
    margins = [score[group, 0] - score[group, 1] for group, sample in score if sample == 0]
    expected = math.fsum(by_hand(fields, margin) for margin in margins) / len(margins)
    assert len(margins) == 6
    assert float(parts["mass"] / batch.mass.sum()) == pytest.approx(expected, abs=1e-12)
    means = metrics.means()
    assert means["pair_accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / 6)
    assert means["pair_margin"] == pytest.approx(fields.get("beta", 0.1) * math.fsum(margins) / 6)
    assert means["preferred_reward"] - means["other_reward"] == pytest.approx(means["pair_margin"])


GOLDEN: list[tuple[dict[str, Any], float]] = [
    ({"type": "dpo"}, 0.8715890213),
    ({"type": "dpo", "loss": "hinge"}, 1.2808878048),
    ({"type": "dpo", "loss": "ipo", "length_normalised": True}, 3.0985959478),
    ({"type": "dpo", "length_normalised": True}, 0.8598896584),
    ({"type": "dpo", "label_smoothing": 0.2}, 0.8154114603),
    ({"type": "reward_model", "centre": 0.03}, 0.8937321694),
]


@pytest.mark.parametrize(("fields", "expected"), GOLDEN, ids=str)
def test_golden_numbers_of_another_implementation(fields: dict[str, Any], expected: float) -> None:
    """Made by executing the loss lines of TRL 1.16's DPO and reward trainers on the same float64 inputs.

    Its IPO always divides by the length; its smoothed labels are those of loss `aot` on pairs in their order, as its
    `robust` is another loss.
    """
    i = torch.arange(12, dtype=torch.float64).reshape(4, 3)
    mask = torch.nn.functional.pad(torch.arange(3) < torch.tensor([3, 2, 3, 1])[:, None], (1, 0))
    wide = lambda x: torch.nn.functional.pad(x, (1, 0), value=5.0)  # noqa: E731
    rewards = torch.tensor([1.0, 0, 0, 1])[:, None] * (torch.arange(4) == 1)
    batch = make_batch(rows=4, width=4).replace(
        mask=mask, rewards=rewards.double(), ref_logprobs=wide(-(1 + torch.cos(i))), unit=torch.tensor([0, 0, 1, 1])
    )
    owner = registry.resolve("algorithms", fields["type"])
    algorithm = owner(owner.Config(**fields, **({"beta": 0.5} if fields["type"] == "dpo" else {})))
    batch, _ = algorithm.credit(batch, START)
    out = PolicyOut(wide(-(1 + torch.sin(i))), torch.zeros(()), None, torch.sin(2 * torch.arange(4).double()))
    parts, _ = algorithm.loss(out, batch, START)
    assert float(parts["mass"] / batch.mass.sum()) == pytest.approx(expected, abs=1e-9)


def test_a_reward_models_loss_is_its_formula(tmp_path: Path) -> None:
    with trainer(tmp_path / "run", recipe(tmp_path, {"type": "reward_model", "centre": 0.1})) as made:
        batch = credited(made)
        out = outputs(batch)
        parts, _ = made.algorithm.loss(out, batch, START)
        episodes = _same(made)
        judged = made.algorithm.judge(out, batch)  # type: ignore[attr-defined]
    assert out.final_values is not None
    score = {(one.group, one.sample): float(out.final_values[row]) for row, one in enumerate(episodes)}
    length = {(one.group, one.sample): len(one.chosen) for one in episodes}
    pairs = [(score[group, 0], score[group, 1]) for group, sample in score if sample == 0]
    expected = math.fsum(math.log1p(math.exp(b - a)) + 0.1 * (a + b) ** 2 for a, b in pairs) / 6
    assert float(parts["mass"] / batch.mass.sum()) == pytest.approx(expected, abs=1e-12)
    assert float(judged["accuracy"][0].mean()) == pytest.approx(sum(a > b for a, b in pairs) / 6)
    longer = [length[group, 0] > length[group, 1] for group, sample in score if sample == 0]
    assert float(judged["longer"][0].mean()) == sum(longer) / 6 == 0  # the wrong answers of these rows are longer


def test_losses_stay_finite_far_out() -> None:
    margin = torch.tensor([-1e4, 0.0, 1e4], dtype=torch.float32, requires_grad=True)
    for loss in (formulas.preferences.sigmoid(margin, 1.0, 0.1), formulas.preferences.bradley_terry(margin, -margin)):
        assert torch.isfinite(loss).all()
        (slope,) = torch.autograd.grad(loss.sum(), margin, retain_graph=True)
        assert torch.isfinite(slope).all()


@pytest.mark.parametrize("fields", [{"type": "dpo"}, {"type": "reward_model"}], ids=lambda each: each["type"])
def test_a_tie_makes_no_pair(tmp_path: Path, fields: dict[str, Any]) -> None:
    with trainer(tmp_path / "run", recipe(tmp_path, fields)) as made:
        batch = credited(made)
        tied = batch.rewards.clone()
        tied[batch.unit < 4] = 0
        tied_batch, sums = made.algorithm.credit(batch.replace(rewards=tied), START)
        parts, _ = made.algorithm.loss(outputs(batch), tied_batch, START)
        kept, _ = made.algorithm.loss(outputs(batch), batch, START)
        all_tied, _ = made.algorithm.credit(batch.replace(rewards=torch.zeros_like(tied)), START)
        nothing, _ = made.algorithm.loss(outputs(batch), all_tied, START)
    assert sums.means()["tied_rate"] == pytest.approx(4 / 6)
    assert float(tied_batch.mass.sum()) == 2
    assert not tied_batch.weights[batch.unit < 4].any()
    assert 0 < float(parts["mass"]) < float(kept["mass"])
    assert float(nothing["mass"]) == float(all_tied.mass.sum()) == 0


LEARN = {"steps": 40, "optimizer": {"lr": 1e-2, "minibatches": 1, "tokens_per_micro_batch": 512}}


@pytest.mark.parametrize(
    "fields", [{"type": "sft", "observation_weight": 1.0}, {"type": "dpo"}, {"type": "reward_model"}]
)
def test_the_loss_falls_on_rows_held_out(tmp_path: Path, fields: dict[str, Any]) -> None:
    changes: dict[str, Any] = {**LEARN, "data": {"rows_per_step": 16, "validation_share": 0.2}}
    with trainer(tmp_path / "run", recipe(tmp_path, fields, **changes)) as made:
        run(made, Stopper())
        metrics = made.run.metrics()
    first, last = (json.loads((tmp_path / f"run/eval/step-{step:06}.json").read_text()) for step in (0, 40))
    assert last["components"]["loss"]["high"] < first["components"]["loss"]["low"]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert (first["reward"], first["failed"], first["split"]) == (None, 0, "validation")
    if fields["type"] != "sft":
        assert last["components"]["accuracy"]["mean"] == metrics[-1]["pair_accuracy"] == 1
        assert metrics[0]["pair_margin"] == pytest.approx(0, abs=1e-5), "the reference is the policy as loaded"
    if fields["type"] == "dpo":
        assert first["components"]["loss"]["mean"] == pytest.approx(math.log(2), abs=1e-6)
        assert first["components"]["accuracy"]["mean"] < 1
    if fields["type"] == "sft":
        assert metrics[-1]["observation_loss"] < metrics[0]["observation_loss"]
    assert {"reward", "sampler_gap", "entropy"}.isdisjoint(metrics[0])


def test_the_references_log_probs_are_computed_once_and_are_the_policys_own_at_the_start(tmp_path: Path) -> None:
    with trainer(tmp_path / "run", recipe(tmp_path, {"type": "dpo"}, data={"validation_share": 0})) as made:
        cache = made.cached_reference
        assert cache is not None
        calls = []
        forward = cache._policy.forward

        def counted(*arguments: Any, **options: Any) -> PolicyOut:
            calls.append(len(arguments[0]))
            return forward(*arguments, **options)

        cache._policy.forward = counted  # type: ignore[method-assign]
        for _ in range(12):
            iteration(made)
        assert sum(calls) == 60, "30 pairs, each side once"
        episodes = made.source.episodes(12)
        batch = collate(episodes, "cpu", pairs=True)
        assert batch is not None
        found = cache.logprobs(batch, episodes)
        cache._known.clear()
        assert torch.equal(cache.logprobs(batch, episodes), found), "a resume finds the same bits"
        start = made.reference
        assert start is not None
        direct = start(batch.tokens, batch.lengths, batch.mask, temperature=1.0, values=False).logprobs
        assert torch.allclose(found, direct, atol=1e-5)
        assert not found[~batch.mask].any()


def test_online_dpo_ranks_the_episodes_of_a_task_by_their_reward(tmp_path: Path) -> None:
    sampling = {"tasks_per_step": 6, "episodes_per_task": 3, "max_new_tokens": 5}
    with trainer(tmp_path / "run", tiny(algorithm={"type": "dpo"}, sampling=sampling)) as made:
        episodes = made.source.episodes(0)
        batch = collate(episodes, "cpu", pairs=True)
        assert batch is not None
        batch, _ = made.algorithm.credit(batch, START)
        rewards: dict[str, list[tuple[float, int]]] = {}
        for row, one in enumerate(episodes):
            rewards.setdefault(one.group, []).append((sum(one.rewards), row))
        paired = [rows for rows in rewards.values() if len({reward for reward, _ in rows}) > 1]
        assert len(paired) > 1
        assert float(batch.mass.sum()) == len(paired)
        for rows in paired:
            best = max(rows, key=lambda item: item[0])[0]
            assert sum(float(batch.mass[row]) for reward, row in rows if reward == best) == 1
            assert sum(bool(batch.weights[row].any()) for _, row in rows) == 2
        made.source.load_state({"cursor": {"sort_digits": 0}})
        iteration(made)
        (row,) = made.run.metrics()
    assert row["pair_margin"] == pytest.approx(0, abs=1e-5)
    assert row["sampler_gap_max"] < 1e-4
    assert row["tied_rate"] == pytest.approx(1 - len(paired) / 6)


def test_online_dpos_gradient_depends_on_no_micro_batch(tmp_path: Path) -> None:
    sampling = {"tasks_per_step": 6, "episodes_per_task": 3, "max_new_tokens": 5}
    with trainer(tmp_path / "run", tiny(algorithm={"type": "dpo"}, sampling=sampling)) as made:
        batch = credited(made)
        made.policy.to(torch.float64)
        assert float(batch.mass.sum()) > 1, "the test needs pairs"
        whole = gradient(made, batch, 10**6)
        assert float(whole.norm()) > 1e-3
        assert distance(gradient(made, batch, 1), whole) < 1e-10
        assert distance(gradient(made, batch, 70), whole) < 1e-10


def test_answers_to_different_prompts_are_no_pair(tmp_path: Path) -> None:
    """An environment may ask one task in several ways; a preference is between two answers to one question."""
    sampling = {"tasks_per_step": 6, "episodes_per_task": 4, "max_new_tokens": 5}
    with trainer(tmp_path / "run", tiny(algorithm={"type": "dpo"}, sampling=sampling)) as made:
        sampled = made.source.episodes(0)
        asked = [  # the second half of each group saw another first token
            replace(one, tokens=(1 + one.tokens[0], *one.tokens[1:])) if one.sample > 1 else one for one in sampled
        ]
        batch = collate(asked, "cpu", pairs=True)
        assert batch is not None
        batch, sums = made.algorithm.credit(batch, START)
        preferred, other = pairs(batch)
        assert len(preferred) > 2, "the test needs pairs"
        assert torch.equal(batch.tokens[preferred, 0], batch.tokens[other, 0])
        assert torch.equal(batch.group[preferred], batch.group[other])
        assert sums.means()["tied_rate"] == pytest.approx(1 - len(preferred) / 12)
        assert sums.means()["lone_episodes"] == 0
        alone = [replace(one, tokens=(2 + one.sample, *one.tokens[1:])) for one in sampled]
        batch = collate(alone, "cpu", pairs=True)
        assert batch is not None
        batch, sums = made.algorithm.credit(batch, START)
        assert float(batch.mass.sum()) == 0
        assert sums.means()["lone_episodes"] == 24
        assert "tied_rate" not in sums.means()


def test_ratio_resamples_units() -> None:
    sums, counts = [1.0, 4.0, 0.0, 3.0] * 50, [1.0, 2.0, 1.0, 4.0] * 50
    found = ratio(sums, counts, "loss", 0)
    assert found.mean == 1.0
    spread = torch.tensor([s - c for s, c in zip(sums, counts, strict=True)]).std() / math.sqrt(200) / 2
    assert found.high - found.mean == pytest.approx(1.96 * float(spread), rel=0.1)
    assert found.mean - found.low == pytest.approx(1.96 * float(spread), rel=0.1)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="label_smoothing has no meaning with loss ipo"):
        settings("algorithms", type="dpo", loss="ipo", label_smoothing=0.1)
    with pytest.raises(ValueError, match="nothing would be learnt"):
        settings("algorithms", type="sft", reply_weight=0.0)

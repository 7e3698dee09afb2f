"""PPO detail by detail, with numbers worked out by hand."""

import itertools
import json
import math

import pytest
import torch
from pydantic import ValidationError

from mrlm_cli import metrics, registry
from mrlm_cli.algorithms.ppo import PPO, ValuePretraining
from mrlm_cli.errors import CheckpointError
from mrlm_cli.records import PolicyOut, Progress
from tests.ppo_helpers import SETTINGS, START, make_batch, make_out, one_row, ppo, spread


def test_golden_numbers_of_another_implementation():
    """Made by executing the reward, GAE and loss lines of TRL 1.12.0's PPO trainer on the same float64 inputs.

    It adds 1e-8 to the variance when it whitens, hence the tolerance. Here its 4 tokens are chosen tokens 1, 3, 4, 7.
    """
    place, i = torch.tensor([1, 3, 4, 7]), torch.arange(8, dtype=torch.float64).reshape(2, 4)

    def wide(x):
        result = torch.full((2, 9), 5.0, dtype=torch.float64)  # what lies between the chosen tokens must not matter
        result[:, place] = x
        return result

    mask = wide(0 * i) == 0
    rewards = torch.zeros(2, 9, dtype=torch.float64)
    rewards[:, 7] = torch.tensor([1.0, -0.5])
    old, values = wide(-(1 + torch.sin(i))), wide(torch.sin(2 * i))
    batch = make_batch(rows=2, width=9).replace(
        mask=mask, rewards=rewards, old_logprobs=old, ref_logprobs=wide(-(1 + torch.cos(i))), values=values
    )
    algorithm = ppo(gamma=0.9, gae_lambda=0.8, value_clip=0.3, whiten_rewards=True, kl={"coef": 0.1})
    batch, _ = algorithm.credit(batch, START)
    out = PolicyOut(
        wide(old[:, place] + 0.3 * torch.cos(3 * i)), old, wide(values[:, place] + 0.5 * torch.sin(5 * i)), None
    )
    measured = algorithm.loss(out, batch, START)[1].means()
    returns = [[0.754696046, 1.197445427, 1.8432861317, 2.3173863463],
               [-0.9818415795, -1.1168703272, -0.9685918744, -1.1453339266]]  # fmt: skip
    advantages = [[0.3388749064, 0.0812676124, 1.3578194573, 1.3560046407],
                  [-1.166244803, -0.3941371503, -0.31637688, -1.2572077834]]  # fmt: skip
    torch.testing.assert_close(batch.returns[:, place], torch.tensor(returns, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        batch.advantages[:, place], torch.tensor(advantages, dtype=torch.float64), rtol=0, atol=1e-6
    )
    assert measured["policy_loss"] == pytest.approx(0.0177262999, abs=1e-6)
    assert measured["value_loss"] == pytest.approx(1.534018219, abs=1e-6)


def test_first_optimizer_step_has_ratio_one():
    algorithm = ppo(kl={"coef": 0.1, "form": "k3"})
    batch = make_batch()
    batch, _ = algorithm.credit(batch.replace(ref_logprobs=batch.old_logprobs), START)
    logprobs = batch.old_logprobs.clone().requires_grad_()
    found, sums = algorithm.loss(PolicyOut(logprobs, batch.values, batch.values, None), batch, START)
    (slope,) = torch.autograd.grad(found["mass"], logprobs)
    torch.testing.assert_close(slope, -batch.advantages * batch.weights)
    measured = sums.means()
    assert [measured[name] for name in ("approx_kl", "clip_fraction", "policy_moved", "kl_loss")] == [0, 0, 0, 0]


def test_order_of_rewards_by_hand():
    algorithm = ppo(
        gamma=0.0, gae_lambda=0.0, whiten_advantages=False, reward_clip=[-1.0, 2.0], missing_end_penalty=0.5,
        reward_scale=True, kl={"coef": 0.1}, whiten_rewards=True,
    )  # fmt: skip
    algorithm.load_state({**algorithm.state(), "reward_count": 4, "reward_mean": 1.5, "reward_m2": 8.0})
    batch, sums = algorithm.credit(one_row([0.0, -3.0, 5.0], truncated=True, ended=False, logprob_gap=3.0), START)
    clipped = [0.0, -1.0, 2.0 - 0.5]  # the penalty comes after the clip and is not clipped away
    m2 = 8.0 + (sum(clipped) - 1.5) ** 2 * 4 / 5  # the running moments take this episode's reward in first
    scale = math.sqrt(m2 / 4)
    penalised = [x / scale - 0.1 * 3.0 for x in clipped]  # β is in reward per nat, whatever the scale
    mean, std = spread(penalised)
    expected = [(x - mean) / std + mean for x in penalised]  # γ = λ = V = 0: the returns are the rewards
    assert batch.returns[0, 1:].tolist() == pytest.approx(expected, rel=1e-12)
    assert sums.means()["reward_scale"] == pytest.approx(scale)
    assert sums.means()["kl"] == pytest.approx(9.0)


def test_running_reward_scale_is_the_std_of_all_rewards_so_far():
    algorithm, rewards = ppo(reward_scale=True), []
    for step, seed in enumerate(range(4)):
        batch = make_batch(seed)
        rewards += batch.rewards.sum(1)[batch.mask.any(1)].tolist()
        _, sums = algorithm.credit(batch, Progress(step, 10))
        assert sums.means()["reward_scale"] == pytest.approx(spread(rewards)[1], rel=1e-12)
    single, sums = ppo(reward_scale=True).credit(one_row([3.0]), START)
    assert sums.means()["reward_scale"] == 1.0  # one reward has no spread yet
    assert single.returns[0, 1].item() == 3.0


def test_adaptive_kl_coefficient_by_hand():
    algorithm = ppo(kl={"coef": 0.1, "target": 4.0, "horizon": 10}, whiten_advantages=False, gae_lambda=1.0)
    coefficient = 0.1
    for step, (gap, error) in enumerate([(2.2, 0.1), (20.0, 0.2), (0.2, -0.2), (2.0, 0.0), (-9.0, -0.2)]):
        batch, sums = algorithm.credit(one_row([0.0, 1.0], logprob_gap=gap), Progress(step, 10))
        assert sums.means()["kl"] == pytest.approx(2 * gap)
        assert sums.means()["kl_coef"] == pytest.approx(coefficient, rel=1e-12)
        assert batch.returns[0, 1].item() == pytest.approx(1.0 - coefficient * 2 * gap)  # the old coefficient
        coefficient *= 1 + error * 1 / 10
        assert algorithm.state()["kl_coef"] == pytest.approx(coefficient, rel=1e-12)


def test_many_episodes_move_the_kl_coefficient_by_a_fifth_at_most():
    algorithm = ppo(kl={"coef": 0.1, "target": 1000.0, "horizon": 2})
    algorithm.credit(make_batch(), START)
    assert algorithm.state()["kl_coef"] == pytest.approx(0.08)


def test_loss_uses_the_kl_coefficient_of_its_iteration():
    algorithm = ppo(kl={"coef": 0.1, "target": 1000.0, "horizon": 2, "form": "k2"}, whiten_advantages=False)
    for step, coefficient in enumerate([0.1, 0.1 * 0.9]):
        batch, sums = algorithm.credit(one_row([0.0], logprob_gap=3.0), Progress(step, 10))
        found, _ = algorithm.loss(PolicyOut(batch.old_logprobs, batch.values, batch.values, None), batch, START)
        assert sums.means()["kl_coef"] == pytest.approx(coefficient)
        assert found["mass"].item() == pytest.approx(coefficient * 4.5)


def test_a_step_that_is_not_finite_leaves_the_state_alone():
    algorithm = ppo(kl={"coef": 0.1, "target": 4.0}, reward_scale=True)
    before = algorithm.state()
    algorithm.credit(one_row([math.nan], logprob_gap=math.inf), START)
    assert algorithm.state() == before


def fixed_point(reward, *, rounds=400, cut_reward_is_paid=True, **settings):
    """V ← mean return, again and again, where every episode is cut and a constant critic says V everywhere."""
    algorithm = ppo(whiten_advantages=False, **settings)
    value, trained = 0.5, 0
    for _ in range(rounds):
        rewards = [0.0, 0.0, reward if cut_reward_is_paid else 0.0]
        batch, _ = algorithm.credit(one_row(rewards, truncated=True, ended=False, value=value, final=value), START)
        if batch.mass.sum() > 0:
            value = (batch.returns * batch.weights).sum().item() / batch.weights.sum().item()
            trained += 1
    return value, trained


def test_values_stay_bounded_when_every_episode_is_cut():
    value, _ = fixed_point(1.0, truncation="terminal")
    assert value == pytest.approx(1.0)  # the cut reply is scored as it stands, and nothing follows
    value, _ = fixed_point(1.0, truncation="terminal", missing_end_penalty=0.25)
    assert value == pytest.approx(0.75)
    value, _ = fixed_point(1.0, truncation="bootstrap", cut_reward_is_paid=False)
    assert value == pytest.approx(0.5)  # the environment was not asked: V stays where it began, it does not climb
    value, _ = fixed_point(1.0, truncation="bootstrap", gamma=0.9, gae_lambda=1.0)
    assert 0 < value < 1 / (1 - 0.9)  # paid a constant reward for ever, bounded by the discount
    value, trained = fixed_point(1.0, truncation="mask")
    assert (value, trained) == (0.5, 0)
    value, _ = fixed_point(1.0, truncation="bootstrap")
    assert value > 100  # the mistake that this guards against: score the cut reply and go on as well


@pytest.mark.parametrize(("truncated", "ended", "penalty"), [(True, False, 1.0), (True, True, 0.0), (False, True, 0.0)])
def test_missing_end_penalty_is_for_episodes_cut_by_length(truncated, ended, penalty):
    algorithm = ppo(missing_end_penalty=1.0, whiten_advantages=False)
    batch, _ = algorithm.credit(one_row([0.0, 2.0], truncated=truncated, ended=ended, final=7.0), START)
    assert batch.returns[0, 2].item() == 2.0 - penalty


def test_final_value_counts_only_after_a_cut_and_only_with_bootstrap():
    for truncation, truncated, expected in [
        ("bootstrap", True, 2.0 + 0.5 * 7.0),
        ("bootstrap", False, 2.0),
        ("terminal", True, 2.0),
    ]:
        algorithm = ppo(truncation=truncation, gamma=0.5, whiten_advantages=False)
        assert algorithm.bootstrap is (truncation == "bootstrap")
        batch, _ = algorithm.credit(one_row([2.0], truncated=truncated, final=7.0), START)
        assert batch.returns[0, 1].item() == expected


def test_whitening_without_spread_says_so():
    batch, sums = ppo(gae_lambda=1.0).credit(one_row([0.0, 0.0, 1.0]), START)
    assert sums.means()["advantage_centred"] == 1.0
    assert sums.means()["advantage_std"] == 0.0
    assert not batch.advantages.any()
    assert "explained_variance" not in sums.means()  # returns that do not vary have none


def test_returns_come_before_whitening():
    raw, _ = ppo(whiten_advantages=False).credit(make_batch(), START)
    white, sums = ppo().credit(make_batch(), START)
    assert torch.equal(raw.returns, white.returns)
    assert not torch.equal(raw.advantages, white.advantages)
    assert sums.means()["advantage_std"] == pytest.approx(spread(raw.advantages[raw.mask].tolist())[1])


def test_value_statistics():
    batch, sums = ppo().credit(make_batch(), START)
    values, returns = batch.values[batch.mask].tolist(), batch.returns[batch.mask].tolist()
    errors = [value - target for value, target in zip(values, returns, strict=True)]
    measured = sums.means()
    assert measured["value_bias"] == pytest.approx(math.fsum(errors) / len(errors))
    assert measured["return"] == pytest.approx(math.fsum(returns) / len(returns))
    assert measured["explained_variance"] == pytest.approx(1 - (spread(errors)[1] / spread(returns)[1]) ** 2)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("form", ["truncate", "mask"])
def test_importance_weights_act_on_the_policy_loss_alone(level, form):
    settings = {"kl": {"coef": 0.2, "form": "k2"}, "entropy": {"coef": 0.1}}
    correction = {"level": level, "form": form, "low": 0.7, "high": 1.6}
    batch, sums = ppo(importance=correction, **settings).credit(make_batch(), START)
    out, expected, weights = make_out(batch), 0.0, []
    for b, row in enumerate(batch.mask.tolist()):
        gaps = {t: (batch.old_logprobs[b, t] - batch.logprobs[b, t]).item() for t, one in enumerate(row) if one}
        for t, gap in gaps.items():
            raw = math.exp(gap if level == "token" else sum(gaps.values()))
            bounded = min(max(raw, 0.7), 1.6)
            weights.append(bounded if form == "truncate" or bounded == raw else 0.0)
            advantage, ratio = batch.advantages[b, t].item(), (out.logprobs - batch.old_logprobs)[b, t].exp().item()
            expected += weights[-1] * max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.2))
    measured = ppo(importance=correction, **settings).loss(out, batch, START)[1].means()
    plain = ppo(**settings).loss(out, batch, START)[1].means()
    assert measured["policy_loss"] == pytest.approx(expected / len(weights))
    assert {name for name in plain if measured[name] != plain[name]} == {"policy_loss"}
    assert sums.means()["importance_weight"] == pytest.approx(math.fsum(weights) / len(weights))
    assert 0 < sums.means()["importance_bounded"] <= 1


def test_value_pretraining_trains_values_alone_for_its_steps():
    algorithm = ppo(value_pretraining={"steps": 2}, entropy={"coef": 0.1}, kl={"coef": 0.1, "target": 100.0})
    for step, expected in enumerate([True, True, False, False]):
        progress = Progress(step, 10)
        assert algorithm.value_only(progress) is expected
        batch, sums = algorithm.credit(make_batch(), progress)
        assert sums.means()["value_pretraining"] == float(expected)
        assert (algorithm.state()["kl_coef"] == 0.1) is expected  # a fixed policy's KL says nothing about β
        out = make_out(batch)
        found, measured = algorithm.loss(out, batch, progress)
        slopes = torch.autograd.grad(
            found["mass"] + found["tokens"], (out.logprobs, out.entropy, out.values), allow_unused=True
        )
        assert [slope is None for slope in slopes] == [expected, expected, False]
        assert found["tokens"].item() != 0
        assert ("policy_loss" in measured.means()) is not expected


def test_value_pretraining_ends_after_the_iteration_that_reached_its_target():
    algorithm = ppo(value_pretraining={"steps": 50, "explained_variance": 0.5}, gae_lambda=1.0, whiten_advantages=False)
    batch = make_batch()
    algorithm.credit(batch, START)
    assert algorithm.value_only(Progress(1, 99))
    returns = algorithm.credit(batch, START)[0].returns
    algorithm.credit(batch.replace(values=returns * 0.9), Progress(1, 99))
    assert algorithm.value_only(Progress(1, 99))  # credit, loss and loop agree about the whole iteration
    assert not algorithm.value_only(Progress(2, 99))
    resumed = ppo(value_pretraining={"steps": 50, "explained_variance": 0.5})
    resumed.load_state(json.loads(json.dumps(algorithm.state())))
    assert not resumed.value_only(Progress(2, 99))


def test_state_survives_json_bit_for_bit():
    settings = {"reward_scale": True, "kl": {"coef": 0.1, "target": 1.0, "horizon": 7}}
    whole, first = ppo(**settings), ppo(**settings)
    for seed in range(3):
        whole.credit(make_batch(seed), Progress(seed, 10))
        first.credit(make_batch(seed), Progress(seed, 10))
    second = ppo(**settings)
    second.load_state(json.loads(json.dumps(first.state())))
    for seed in range(3, 6):
        left, _ = whole.credit(make_batch(seed), Progress(seed, 10))
        right, _ = second.credit(make_batch(seed), Progress(seed, 10))
        assert torch.equal(left.advantages, right.advantages)
    assert whole.state() == second.state()


def test_foreign_state_is_refused():
    with pytest.raises(CheckpointError, match="not PPO"):
        ppo().load_state({"baseline": 1.0})


def test_entropy_coefficient_falls_towards_its_floor():
    for schedule, expected in [
        ("constant", [0.5, 0.5, 0.5, 0.5]),
        ("linear", [0.5, 0.4, 0.3, 0.2]),
        ("cosine", [0.1 + 0.2 * (1 + math.cos(math.pi * x / 4)) for x in range(4)]),
    ]:
        algorithm = ppo(entropy={"coef": 0.5, "schedule": schedule, "floor": 0.2})
        found = [algorithm.credit(make_batch(), Progress(step, 4))[1].means()["entropy_coef"] for step in range(4)]
        assert found == pytest.approx(expected)


def test_stop():
    assert not ppo().stop({"approx_kl": 9.0})
    algorithm = ppo(target_kl=0.05)
    assert [algorithm.stop({"approx_kl": kl}) for kl in (0.0499, 0.05, 0.0501)] == [False, False, True]
    assert not algorithm.stop({"value_loss": 1.0})  # value pretraining moves no policy


def test_reference_is_needed_only_with_a_kl_coefficient():
    assert not ppo().needs.reference
    assert ppo(kl={"coef": 0.1}).needs.reference
    assert ppo().needs.values
    algorithm, batch = ppo(), make_batch()
    algorithm.credit(batch.replace(ref_logprobs=None), START)


def test_every_metric_is_explained_and_finite():
    names = set()
    for settings in SETTINGS.values():
        algorithm = ppo(value_pretraining={"steps": 1}, **settings)
        for progress in (START, Progress(1, 10)):
            batch, credited = algorithm.credit(make_batch(), progress)
            _, measured = algorithm.loss(make_out(batch), batch, progress)
            found = {**credited.means(), **measured.means()}
            assert all(math.isfinite(x) for x in found.values())
            names |= set(found)
    assert names <= set(metrics.METRICS)
    assert {"kl_loss", "value_clip_fraction", "importance_weight", "policy_moved", "advantage_centred"} <= names


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"clip": [0.2]}, "clip"),
        ({"clip": [0.0, 0.2]}, "clip"),
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"gamma": 1.01}, "gamma"),
        ({"gae_lambda": -0.1}, "gae_lambda"),
        ({"entropy": {"coef": 0.1, "shape": "linear"}}, "shape"),
        ({"kl": {"coef": 0.1, "form": "k1"}}, "form"),
        ({"kl": {"target": 3.0}}, "cannot adapt"),
        ({"reward_clip": [0.5, 1.0]}, "enclose 0"),
        ({"reward_clip": [0.0, 0.0]}, "no reward"),
        ({"missing_end_penalty": 1.0, "truncation": "bootstrap"}, "truncation bootstrap"),
        ({"missing_end_penalty": 1.0, "truncation": "mask"}, "truncation mask"),
        ({"missing_end_penalty": -1.0}, "missing_end_penalty"),
        ({"aggregation": "constant"}, "constant_length"),
        ({"constant_length": 5}, "constant_length"),
        ({"whiten_advantages": 1}, "whiten_advantages"),
        ({"value_coef": math.nan}, "value_coef"),
        ({"value_pretraining": {"explained_variance": 0.5}}, "steps"),
    ],
)
def test_bad_settings_are_refused(settings, text):
    with pytest.raises(ValidationError, match=text):
        ppo(**settings)


def test_every_setting_has_a_sentence():
    models = [PPO.Config, ValuePretraining, *(type(getattr(ppo().config, name)) for name in ("entropy", "kl"))]
    for model, (name, field) in itertools.chain.from_iterable(((m, x) for x in m.model_fields.items()) for m in models):
        assert field.description, f"{model.__name__}.{name}"


def test_registry_knows_it():
    assert registry.resolve("algorithms", "ppo") is PPO

"""PPO's credit and loss against a slow reference in Python floats, and the invariances that training rests on."""

import math

import pytest
import torch

from mrlm_cli import metrics
from mrlm_cli.records import PolicyOut, Progress
from tests.ppo_helpers import SETTINGS, START, each_field, make_batch, make_out, ppo, spread


def slow_credit(config, batch):
    """Advantages, returns, weights as {(row, t): number} and mass [row] of a first step, one loop after the other."""
    rows = range(len(batch.mask))
    chosen = {b: [t for t, one in enumerate(batch.mask[b].tolist()) if one] for b in rows}
    if config.truncation == "mask":
        chosen = {b: [] if batch.truncated[b] else chosen[b] for b in rows}
    places = [(b, t) for b in rows for t in chosen[b]]
    reward = {place: batch.rewards[place].item() for place in places}
    if config.reward_clip:
        low, high = config.reward_clip
        reward = {place: min(max(x, low), high) for place, x in reward.items()}
    for b in rows:
        if chosen[b] and batch.truncated[b] and not batch.ended[b]:
            reward[b, chosen[b][-1]] -= config.missing_end_penalty
    if config.reward_scale:
        _, std = spread([sum(reward[b, t] for t in chosen[b]) for b in rows if chosen[b]])
        reward = {place: x / std for place, x in reward.items()}
    if config.kl.form == "reward" and config.kl.coef > 0:
        for place in places:
            reward[place] -= config.kl.coef * (batch.old_logprobs[place] - batch.ref_logprobs[place]).item()
    if config.whiten_rewards:
        mean, std = spread(list(reward.values()))
        reward = {place: (x - mean) / std + mean for place, x in reward.items()}

    def estimate(gae_lambda):
        found = {}
        for b in rows:
            advantage, following = 0.0, 0.0
            if config.truncation == "bootstrap" and batch.truncated[b]:
                following = batch.final_values[b].item()
            for t in reversed(chosen[b]):
                value = batch.values[b, t].item()
                advantage = reward[b, t] + config.gamma * following - value + config.gamma * gae_lambda * advantage
                following = value
                found[b, t] = advantage
        return found

    advantages = estimate(config.gae_lambda)
    value_lambda = config.gae_lambda if config.gae_lambda_value is None else config.gae_lambda_value
    returns = {place: x + batch.values[place].item() for place, x in estimate(value_lambda).items()}
    if config.whiten_advantages:
        mean, std = spread(list(advantages.values()))
        advantages = {place: (x - mean) / std for place, x in advantages.items()}
    weights = {(b, t): 1 / len(chosen[b]) if config.aggregation == "sequence" else 1.0 for b, t in places}
    of_row = {"token": len, "sequence": bool, "constant": lambda turn: bool(turn) * config.constant_length}
    mass = [float(of_row[config.aggregation](chosen[b])) for b in rows]
    return advantages, returns, weights, mass


def scattered(numbers, like):
    result = torch.zeros_like(like)
    for place, x in numbers.items():
        result[place] = x
    return result


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("seed", range(3))
def test_credit_equals_the_slow_reference(name, seed):
    algorithm, batch = ppo(**SETTINGS[name]), make_batch(seed)
    found, _ = algorithm.credit(batch, START)
    advantages, returns, weights, mass = slow_credit(algorithm.config, batch)
    for left, right in ((found.advantages, advantages), (found.returns, returns), (found.weights, weights)):
        torch.testing.assert_close(left, scattered(right, left), rtol=1e-11, atol=1e-11)
    assert found.mass.tolist() == mass


def slow_loss(algorithm, out, batch, progress):
    """The two sums and the mean of every metric, token by token."""
    config, total = algorithm.config, {"mass": 0.0, "tokens": 0.0}
    per_token, over_mass = {}, {"policy_loss": 0.0, "kl_loss": 0.0}

    def measure(name, x):
        per_token.setdefault(name, []).append(x)

    factor = 1 - 0.9 * progress.step / progress.steps if config.entropy.schedule == "linear" else 1.0
    for b, t in batch.mask.nonzero().tolist():
        if batch.mass[b] == 0:
            continue
        new, old, value, was, target, advantage = (
            x[b, t].item()
            for x in (out.logprobs, batch.old_logprobs, out.values, batch.values, batch.returns, batch.advantages)
        )
        ratio = math.exp(new - old)
        term = max(-advantage * ratio, -advantage * min(max(ratio, 1 - config.clip[0]), 1 + config.clip[1]))
        if config.dual_clip and advantage < 0:
            term = min(term, -advantage * config.dual_clip)
        if config.importance:
            term *= min(config.importance.high, math.exp(old - batch.logprobs[b, t].item()))
        k1 = new - batch.ref_logprobs[b, t].item()
        estimate = {"reward": 0.0, "k2": k1**2 / 2, "k3": math.exp(-k1) - 1 + k1, "k3+": math.exp(-k1) - 1 + k1}
        weight = batch.weights[b, t].item()
        over_mass["policy_loss"] += weight * term
        over_mass["kl_loss"] += weight * estimate[config.kl.form]
        total["mass"] += weight * (term + config.kl.coef * estimate[config.kl.form])
        measure("approx_kl", ratio - 1 - math.log(ratio))
        measure("clip_fraction", float(not 1 - config.clip[0] <= ratio <= 1 + config.clip[1]))
        measure("policy_moved", abs(new - old))
        measure("entropy", out.entropy[b, t].item())
        error = (value - target) ** 2
        if config.value_clip:
            near = min(max(value, was - config.value_clip), was + config.value_clip)
            error = max(error, (near - target) ** 2)
            measure("value_clip_fraction", float(abs(value - was) > config.value_clip))
        measure("value_loss", error / 2)
        total["tokens"] += config.value_coef * error / 2 - config.entropy.coef * factor * out.entropy[b, t].item()
    if config.kl.form == "reward":
        del over_mass["kl_loss"]
    mass = batch.mass.sum().item()
    means = {name: math.fsum(xs) / len(xs) for name, xs in per_token.items()}
    return total, means | {name: x / mass for name, x in over_mass.items()}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("seed", range(2))
def test_loss_equals_the_slow_reference(name, seed):
    algorithm, progress = ppo(**SETTINGS[name]), Progress(4, 10)
    batch, _ = algorithm.credit(make_batch(seed), progress)
    out = make_out(batch, seed + 10)
    found, sums = algorithm.loss(out, batch, progress)
    expected, measured = slow_loss(algorithm, out, batch, progress)
    assert {name: x.item() for name, x in found.items()} == pytest.approx(expected, rel=1e-11)
    assert sums.means() == pytest.approx(measured, rel=1e-9)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "k3+"])  # its gradient is another's on purpose
def test_loss_has_the_gradient_of_finite_differences(name):
    algorithm = ppo(**SETTINGS[name])
    batch, _ = algorithm.credit(make_batch(rows=4, width=8), START)
    out = make_out(batch)

    def sums(logprobs, entropy, values):
        found, _ = algorithm.loss(PolicyOut(logprobs, entropy, values, None), batch, START)
        return found["mass"], found["tokens"]

    assert torch.autograd.gradcheck(sums, (out.logprobs, out.entropy, out.values))


def gradient(algorithm, batch, out, rows, progress=START):
    """Loss and gradient of an optimizer step in micro-batches of the given rows, normalised as the update does it."""
    mass, tokens = batch.mass.sum(), (batch.weights > 0).sum()
    total, measured = 0.0, metrics.Sums()
    for index in rows:
        part = batch.rows(index)
        width = part.mask.shape[1]
        parts = PolicyOut(out.logprobs[index, :width], out.entropy[index, :width], out.values[index, :width], None)
        found, sums = algorithm.loss(parts, part, progress)
        total = total + found["mass"] / mass + found["tokens"] / tokens
        measured.update(sums)
    gradients = torch.autograd.grad(total, (out.logprobs, out.entropy, out.values), materialize_grads=True)
    return total, gradients, measured.means()


@pytest.mark.parametrize("name", SETTINGS)
def test_micro_batches_change_nothing(name):
    algorithm = ppo(**SETTINGS[name])
    batch, _ = algorithm.credit(make_batch(), START)
    out = make_out(batch)
    whole = gradient(algorithm, batch, out, [torch.arange(6)])
    for cut in ([[0], [1], [2], [3], [4], [5]], [[5, 0], [3, 1], [4, 2]], [[4, 5, 1], [0, 3, 2]]):
        loss, gradients, measured = gradient(algorithm, batch, out, [torch.tensor(rows) for rows in cut])
        torch.testing.assert_close(loss, whole[0], rtol=1e-10, atol=1e-12)
        for left, right in zip(gradients, whole[1], strict=True):
            torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)
        assert measured == pytest.approx(whole[2], rel=1e-10)


@pytest.mark.parametrize("name", SETTINGS)
def test_padding_and_order_of_rows_change_nothing(name):
    batch, order = make_batch(), torch.tensor([3, 5, 0, 4, 1, 2])
    one, two, three = (ppo(**SETTINGS[name]) for _ in range(3))
    expected, measured = one.credit(batch, START)
    padded, measured_padded = two.credit(
        each_field(batch, lambda x: torch.nn.functional.pad(x, (0, 5)) if x.ndim == 2 else x), START
    )
    permuted, measured_permuted = three.credit(each_field(batch, lambda x: x[order]), START)
    for field in ("advantages", "returns", "weights"):
        found, right = getattr(padded, field), getattr(expected, field)
        torch.testing.assert_close(found[:, :14], right, rtol=1e-12, atol=1e-12)
        assert not found[:, 14:].any()
        torch.testing.assert_close(getattr(permuted, field), right[order], rtol=1e-12, atol=1e-12)
    assert measured_padded.means() == pytest.approx(measured.means(), rel=1e-10)
    assert measured_permuted.means() == pytest.approx(measured.means(), rel=1e-10)
    assert three.state() == pytest.approx(one.state())
    out = make_out(expected)
    wide = PolicyOut(*(torch.nn.functional.pad(x, (0, 5)) for x in (out.logprobs, out.entropy, out.values)), None)
    found, right = two.loss(wide, padded, START)[0], one.loss(out, expected, START)[0]
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SETTINGS)
def test_nan_outside_the_chosen_tokens_is_harmless_and_inside_it_is_seen(name):
    batch = make_batch()
    excluded = batch.truncated if SETTINGS[name].get("truncation") == "mask" else torch.zeros(6, dtype=torch.bool)
    outside = ~batch.mask | excluded[:, None]

    def dirty(x):
        poisoned = x.is_floating_point() and x.ndim == 2
        return torch.where(outside, torch.nan, x) if poisoned else x

    one, two = ppo(**SETTINGS[name]), ppo(**SETTINGS[name])
    clean, _ = one.credit(batch, START)
    found, _ = two.credit(each_field(batch, dirty), START)
    for field in ("advantages", "returns", "weights", "mass"):
        assert torch.equal(getattr(found, field), getattr(clean, field))
    out = make_out(clean)
    poisoned = PolicyOut(*(dirty(x).detach().requires_grad_() for x in (out.logprobs, out.entropy, out.values)), None)
    loss, gradients, _ = gradient(one, clean, out, [torch.arange(6)])
    dirty_loss, dirty_gradients, _ = gradient(two, found, poisoned, [torch.arange(6)])
    assert torch.equal(loss, dirty_loss)
    assert all(torch.equal(left, right) for left, right in zip(gradients, dirty_gradients, strict=True))
    with torch.no_grad():
        out.logprobs[tuple((clean.weights > 0).nonzero()[0])] = torch.nan
    assert one.loss(out, clean, START)[0]["mass"].isnan()

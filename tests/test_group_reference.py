"""The group methods' credit and loss against a slow reference in Python floats, and the invariances of training."""

import math
import statistics

import pytest
import torch

from mrlm_cli import metrics
from mrlm_cli.records import PolicyOut, Progress
from tests.group_helpers import SETTINGS, group, make_groups
from tests.ppo_helpers import START, each_field, make_out, spread


def slow_importance(config, batch, b, chosen):
    """{t: (weight, whether the raw one lies outside)} of a row."""
    if config.importance is None:
        return dict.fromkeys(chosen, (1.0, False))
    settings = config.importance
    gaps = {t: (batch.old_logprobs[b, t] - batch.logprobs[b, t]).item() for t in chosen}
    if settings.level == "sequence":
        gaps = dict.fromkeys(gaps, sum(gaps.values()))
    found = {}
    for t, gap in gaps.items():
        raw = math.exp(gap)
        inside = settings.low <= raw <= settings.high
        bound = 0.0 if settings.form == "mask" else settings.low if raw < settings.low else settings.high
        found[t] = (raw if inside else bound, not inside)
    return found


def chosen_tokens(config, batch):
    """Row -> its chosen tokens, none of a row that does not count."""
    rows = {b: [t for t, one in enumerate(row) if one] for b, row in enumerate(batch.mask.tolist())}
    return {b: [] if config.truncation == "mask" and batch.truncated[b] else ts for b, ts in rows.items()}


def slow_credit(config, batch):
    """Advantages, weights as {(row, t): number} and mass [row], one loop after the other."""
    chosen = chosen_tokens(config, batch)
    rows = [b for b in chosen if chosen[b]]
    k1 = {(b, t): (batch.old_logprobs[b, t] - batch.ref_logprobs[b, t]).item() for b in rows for t in chosen[b]}
    score = {b: sum(batch.rewards[b, t].item() for t in chosen[b]) for b in rows}
    for b in rows:
        if config.overlong:
            free = config.overlong.limit - config.overlong.buffer
            score[b] -= config.overlong.penalty * min(max((len(chosen[b]) - free) / config.overlong.buffer, 0), 1)
        if config.kl.form == "score":
            score[b] -= config.kl.coef * sum(k1[b, t] for t in chosen[b])
    advantages, lone = {}, 0
    for b in rows:
        mine = [x for x in rows if config.baseline == "batch" or batch.group[x] == batch.group[b]]
        if config.baseline != "none" and len(mine) < 2:
            lone += 1
            continue
        others = [x for x in mine if x != b] if config.baseline == "leave_one_out" else mine
        advantage = score[b] - (0.0 if config.baseline == "none" else statistics.fmean(score[x] for x in others))
        if config.scale != "none":
            among = [score[x] for x in rows if config.scale == "batch" or batch.group[x] == batch.group[b]]
            advantage /= (statistics.stdev(among) if len(among) > 1 else 0.0) + config.scale_eps
        for t in chosen[b]:
            later = sum(k1[b, s] for s in chosen[b] if s >= t) if config.kl.form == "reward" else 0.0
            advantages[b, t] = advantage - config.kl.coef * later
    if config.whiten:
        mean, std = spread(list(advantages.values()))
        advantages = {place: (x - mean) / std for place, x in advantages.items()}
    weights = {(b, t): 1 / len(chosen[b]) if config.aggregation == "sequence" else 1.0 for b, t in k1}
    of_row = {"token": len, "sequence": bool, "constant": lambda turn: bool(turn) * config.constant_length}
    return advantages, weights, [float(of_row[config.aggregation](chosen[b])) for b in chosen], lone


def scattered(numbers, like):
    result = torch.zeros_like(like)
    for place, x in numbers.items():
        result[place] = x
    return result


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("seed", range(3))
def test_credit_equals_the_slow_reference(name, seed):
    algorithm, batch = group(**SETTINGS[name]), make_groups(seed)
    found, sums = algorithm.credit(batch, START)
    advantages, weights, mass, lone = slow_credit(algorithm.config, batch)
    for left, right in ((found.advantages, advantages), (found.weights, weights)):
        torch.testing.assert_close(left, scattered(right, left), rtol=1e-11, atol=1e-11)
    assert found.mass.tolist() == mass
    assert sums.means().get("lone_episodes", 0) == lone
    assert found.returns is None


def slow_loss(algorithm, out, batch, progress):
    """The two sums and the mean of every metric, token by token."""
    config, total = algorithm.config, {"mass": 0.0, "tokens": 0.0}
    per_token, over_mass = {}, {"policy_loss": 0.0, "kl_loss": 0.0}

    def measure(name, x):
        per_token.setdefault(name, []).append(x)

    entropy_coef = config.entropy.coef * (0.6 if config.entropy.schedule == "linear" else 1.0)
    low, high = config.clip or (math.inf, math.inf)
    trained = chosen_tokens(config, batch)
    gone_from_reference, trained_rows = 0.0, sum(bool(batch.mass[b] > 0 and chosen) for b, chosen in trained.items())
    for b, chosen in trained.items():
        gaps = {t: (out.logprobs[b, t] - batch.old_logprobs[b, t]).item() for t in chosen}
        for t, (importance, _) in slow_importance(config, batch, b, chosen).items():
            new, advantage, weight = (
                out.logprobs[b, t].item(),
                batch.advantages[b, t].item(),
                batch.weights[b, t].item(),
            )
            whole = {"token": gaps[t], "sequence_sum": sum(gaps.values())}
            ratio = math.exp(whole.get(config.ratio, sum(gaps.values()) / len(gaps)))
            clipped = min(max(ratio, 1 - low), 1 + high)
            if config.objective == "cispo":
                term = -clipped * advantage * new
            else:
                term = max(-advantage * ratio, -advantage * clipped)
                if config.dual_clip and advantage < 0:
                    term = min(term, -advantage * config.dual_clip)
            k1 = new - batch.ref_logprobs[b, t].item()
            kl = {"k2": k1**2 / 2, "k3": math.exp(-k1) - 1 + k1, "k3+": math.exp(-k1) - 1 + k1}.get(config.kl.form, 0.0)
            over_mass["policy_loss"] += weight * importance * term
            over_mass["kl_loss"] += weight * kl
            gone_from_reference += (batch.old_logprobs[b, t] - batch.ref_logprobs[b, t]).item()
            total["mass"] += weight * (importance * term + config.kl.coef * kl)
            total["tokens"] -= entropy_coef * out.entropy[b, t].item()
            measure("approx_kl", math.exp(gaps[t]) - 1 - gaps[t])
            measure("policy_moved", abs(gaps[t]))
            measure("entropy", out.entropy[b, t].item())
            if config.clip and (config.ratio == "token" or t == chosen[0]):  # an episode's ratio counts once
                measure("clip_fraction", float(not 1 - low <= ratio <= 1 + high))
    measured = {}
    if config.kl.coef == 0 or config.kl.form in ("score", "reward"):
        del over_mass["kl_loss"]
    else:
        measured["kl"] = gone_from_reference / trained_rows
    mass = batch.mass.sum().item()
    means = {name: math.fsum(xs) / len(xs) for name, xs in per_token.items()}
    return total, means | measured | {name: x / mass for name, x in over_mass.items()}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("seed", range(2))
def test_loss_equals_the_slow_reference(name, seed):
    algorithm, progress = group(**SETTINGS[name]), Progress(4, 10)
    batch, _ = algorithm.credit(make_groups(seed), progress)
    out = make_out(batch, seed + 10)
    found, sums = algorithm.loss(out, batch, progress)
    expected, measured = slow_loss(algorithm, out, batch, progress)
    assert {name: x.item() for name, x in found.items()} == pytest.approx(expected, rel=1e-11)
    assert sums.means() == pytest.approx(measured, rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("form", ["truncate", "mask"])
def test_importance_weights_act_on_the_policy_loss_alone(seed, level, form):
    correction = {"level": level, "form": form, "low": 0.7, "high": 1.6}
    algorithm = group(type="group", importance=correction, kl={"coef": 0.2}, entropy={"coef": 0.1})
    batch, credited = algorithm.credit(make_groups(seed), START)
    weights = {
        (b, t): pair
        for b, chosen in chosen_tokens(algorithm.config, batch).items()
        for t, pair in slow_importance(algorithm.config, batch, b, chosen).items()
    }
    assert credited.means()["importance_weight"] == pytest.approx(statistics.fmean(w for w, _ in weights.values()))
    assert credited.means()["importance_bounded"] == pytest.approx(statistics.fmean(o for _, o in weights.values()))
    plain = group(type="group", kl={"coef": 0.2}, entropy={"coef": 0.1})
    out = make_out(batch)
    found, measured = algorithm.loss(out, batch, START)
    expected, unweighted = plain.loss(out, batch, START)
    assert torch.equal(found["tokens"], expected["tokens"])
    assert measured.means()["kl_loss"] == unweighted.means()["kl_loss"]
    by_hand = slow_loss(algorithm, out, batch, START)[1]["policy_loss"]
    assert measured.means()["policy_loss"] == pytest.approx(by_hand)
    assert measured.means()["policy_loss"] != pytest.approx(unweighted.means()["policy_loss"])


STOPPED = {"cispo", "masked", "everything"}  # their gradient is not that of their value, on purpose


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in STOPPED])
def test_loss_has_the_gradient_of_finite_differences(name):
    algorithm = group(**SETTINGS[name])
    batch, _ = algorithm.credit(make_groups(), START)
    out = make_out(batch)

    def sums(logprobs, entropy):
        found, _ = algorithm.loss(PolicyOut(logprobs, entropy, None, None), batch, START)
        return found["mass"]

    assert torch.autograd.gradcheck(sums, (out.logprobs, out.entropy))


def gradient(algorithm, batch, out, rows, progress=START):
    """Loss and gradient of an optimizer step in micro-batches of the given rows, normalised as the update does it."""
    mass, tokens = batch.mass.sum(), (batch.weights > 0).sum()
    total, measured = 0.0, metrics.Sums()
    for index in rows:
        part = batch.rows(index)
        width = part.mask.shape[1]
        parts = PolicyOut(out.logprobs[index, :width], out.entropy[index, :width], None, None)
        found, sums = algorithm.loss(parts, part, progress)
        total = total + found["mass"] / mass + found["tokens"] / tokens
        measured.update(sums)
    gradients = torch.autograd.grad(total, (out.logprobs, out.entropy), materialize_grads=True)
    return total, gradients, measured.means()


@pytest.mark.parametrize("name", SETTINGS)
def test_micro_batches_change_nothing(name):
    algorithm = group(**SETTINGS[name])
    batch, _ = algorithm.credit(make_groups(), START)
    out = make_out(batch)
    whole = gradient(algorithm, batch, out, [torch.arange(9)])
    for cut in ([[b] for b in range(9)], [[5, 0, 8], [3, 1], [4, 2, 7, 6]]):
        loss, gradients, measured = gradient(algorithm, batch, out, [torch.tensor(rows) for rows in cut])
        torch.testing.assert_close(loss, whole[0], rtol=1e-10, atol=1e-12)
        for left, right in zip(gradients, whole[1], strict=True):
            torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)
        assert measured == pytest.approx(whole[2], rel=1e-10)


@pytest.mark.parametrize("name", SETTINGS)
def test_padding_and_order_of_rows_change_nothing(name):
    batch, order = make_groups(), torch.tensor([3, 8, 5, 0, 7, 4, 1, 6, 2])
    algorithm = group(**SETTINGS[name])
    expected, measured = algorithm.credit(batch, START)
    wide = each_field(batch, lambda x: torch.nn.functional.pad(x, (0, 5)) if x.ndim == 2 else x)
    padded, measured_padded = algorithm.credit(wide, START)
    permuted, measured_permuted = algorithm.credit(each_field(batch, lambda x: x[order]), START)
    for field in ("advantages", "weights"):
        found, right = getattr(padded, field), getattr(expected, field)
        torch.testing.assert_close(found[:, :14], right, rtol=1e-12, atol=1e-12)
        assert not found[:, 14:].any()
        torch.testing.assert_close(getattr(permuted, field), right[order], rtol=1e-11, atol=1e-11)
    assert measured_padded.means() == pytest.approx(measured.means(), rel=1e-10)
    assert measured_permuted.means() == pytest.approx(measured.means(), rel=1e-10)


@pytest.mark.parametrize("name", SETTINGS)
def test_nan_outside_the_chosen_tokens_is_harmless_and_inside_it_is_seen(name):
    batch, algorithm = make_groups(), group(**SETTINGS[name])
    excluded = batch.truncated if SETTINGS[name].get("truncation") == "mask" else torch.zeros(9, dtype=torch.bool)
    outside = ~batch.mask | excluded[:, None]

    def dirty(x):
        return torch.where(outside, torch.nan, x) if x.is_floating_point() and x.ndim == 2 else x

    clean, _ = algorithm.credit(batch, START)
    found, _ = algorithm.credit(each_field(batch, dirty), START)
    for field in ("advantages", "weights", "mass"):
        assert torch.equal(getattr(found, field), getattr(clean, field))
    out = make_out(clean)
    poisoned = PolicyOut(*(dirty(x).detach().requires_grad_() for x in (out.logprobs, out.entropy)), None, None)
    loss, gradients, _ = gradient(algorithm, clean, out, [torch.arange(9)])
    dirty_loss, dirty_gradients, _ = gradient(algorithm, found, poisoned, [torch.arange(9)])
    assert torch.equal(loss, dirty_loss)
    assert all(torch.equal(left, right) for left, right in zip(gradients, dirty_gradients, strict=True))
    with torch.no_grad():
        out.logprobs[tuple((clean.weights > 0).nonzero()[0])] = torch.nan
    assert algorithm.loss(out, clean, START)[0]["mass"].isnan()


@pytest.mark.parametrize("name", SETTINGS)
def test_every_metric_is_explained_and_finite(name):
    algorithm = group(**SETTINGS[name])
    batch, credited = algorithm.credit(make_groups(), START)
    _, measured = algorithm.loss(make_out(batch), batch, START)
    found = {**credited.means(), **measured.means()}
    assert all(math.isfinite(x) for x in found.values())
    assert set(found) <= set(metrics.METRICS)

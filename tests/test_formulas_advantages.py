"""GAE over chosen tokens and the masked statistics, against slow obvious references in Python floats."""

import math

import pytest
import torch

from mrlm_cli.formulas import advantages


def slow_gae(rewards, values, mask, bootstrap, gamma, gae_lambda):
    """One row as lists: A_k = Σ_j (γλ)^j δ_{k+j} over its chosen tokens, by the definition (a double sum)."""
    chosen = [t for t, one in enumerate(mask) if one]
    following = ([values[t] for t in chosen] + [bootstrap])[1:]
    deltas = [rewards[t] + gamma * after - values[t] for t, after in zip(chosen, following, strict=True)]
    result = [0.0] * len(mask)
    for k, t in enumerate(chosen):
        result[t] = sum((gamma * gae_lambda) ** (j - k) * deltas[j] for j in range(k, len(deltas)))
    return result


def multi_turn(seed, rows=5, width=17):
    """Random rows of several turns: runs of chosen tokens with gaps between them, one row with nothing chosen."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(rows, width, dtype=torch.bool)
    for row in range(rows - 1):
        t = 1
        while t < width:
            gap, run = torch.randint(0, 4, (2,), generator=generator).tolist()
            mask[row, t + gap : t + gap + run] = True
            t += gap + run + 1
    noise = torch.randn(3, rows, width, dtype=torch.float64, generator=generator)
    bootstrap = torch.randn(rows, dtype=torch.float64, generator=generator)
    return noise[0], noise[1], noise[2], mask, bootstrap


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 1.0), (0.97, 0.5), (1.0, 0.0), (0.0, 1.0)])
def test_gae_equals_its_definition(seed, gamma, gae_lambda):
    rewards, values, _, mask, bootstrap = multi_turn(seed)
    found = advantages.gae(rewards, values, mask, bootstrap, gamma, gae_lambda)
    expected = [
        slow_gae(*row, gamma, gae_lambda)
        for row in zip(rewards.tolist(), values.tolist(), mask.tolist(), bootstrap.tolist(), strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_gae_by_hand_jumps_over_the_environment():
    mask = torch.tensor([[False, True, False, False, True, False]])
    rewards = torch.tensor([[0.0, 1.0, 0.0, 0.0, 2.0, 0.0]])
    values = torch.tensor([[9.0, 0.5, 9.0, 9.0, 0.25, 9.0]])
    found = advantages.gae(rewards, values, mask, torch.tensor([4.0]), 0.5, 0.5)
    last = 2.0 + 0.5 * 4.0 - 0.25  # 3.75
    first = 1.0 + 0.5 * 0.25 - 0.5 + 0.25 * last  # 1.5625
    assert found.tolist() == [[0.0, first, 0.0, 0.0, last, 0.0]]


def test_gae_ignores_what_was_not_chosen_and_keeps_what_is_wrong():
    rewards, values, noise, mask, bootstrap = multi_turn(3)
    clean = advantages.gae(rewards, values, mask, bootstrap, 0.9, 0.8)
    nan = torch.full_like(noise, torch.nan)
    dirty = advantages.gae(torch.where(mask, rewards, nan), torch.where(mask, values, nan), mask, bootstrap, 0.9, 0.8)
    assert torch.equal(clean, dirty)
    t = int(mask[0].nonzero()[-1])
    values[0, t] = torch.nan
    broken = advantages.gae(rewards, values, mask, bootstrap, 0.9, 0.8)
    assert broken[0, t].isnan()
    assert torch.equal(broken[1:], clean[1:])


def test_gae_is_invariant_to_padding_and_row_order():
    rewards, values, noise, mask, bootstrap = multi_turn(4)
    expected = advantages.gae(rewards, values, mask, bootstrap, 0.9, 0.8)
    padded = [torch.cat((x, noise[:, :6]), 1) for x in (rewards, values)]
    wide = advantages.gae(*padded, torch.nn.functional.pad(mask, (0, 6)), bootstrap, 0.9, 0.8)
    assert torch.equal(wide, torch.nn.functional.pad(expected, (0, 6)))
    order = torch.tensor([4, 2, 0, 3, 1])
    permuted = advantages.gae(rewards[order], values[order], mask[order], bootstrap[order], 0.9, 0.8)
    assert torch.equal(permuted, expected[order])


def test_gae_without_any_chosen_token_is_zero():
    x = torch.ones(2, 3)
    assert torch.equal(advantages.gae(x, x, x < 0, torch.ones(2), 1.0, 1.0), torch.zeros(2, 3))


def test_last_chosen():
    mask = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
    expected = torch.tensor([[0, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    assert torch.equal(advantages.last_chosen(mask), expected)


@pytest.mark.parametrize("seed", range(4))
def test_masked_statistics_and_whitening(seed):
    x, y, noise, mask, _ = multi_turn(seed)
    x = 3 * x + 7
    entries = [value for value, one in zip(x.flatten().tolist(), mask.flatten().tolist(), strict=True) if one]
    mean = math.fsum(entries) / len(entries)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in entries) / (len(entries) - 1))
    dirty = torch.where(mask, x, torch.full_like(noise, torch.nan))
    assert float(advantages.masked_mean(dirty, mask)) == pytest.approx(mean, rel=1e-13)
    assert float(advantages.masked_std(dirty, mask)) == pytest.approx(std, rel=1e-13)
    whitened, found, centred = advantages.whiten(dirty, mask)
    assert (float(found), bool(centred)) == (pytest.approx(std), False)
    torch.testing.assert_close(whitened, torch.where(mask, (x - mean) / std, 0.0), rtol=1e-12, atol=1e-12)
    kept, _, _ = advantages.whiten(dirty, mask, keep_mean=True)
    assert float(advantages.masked_mean(kept, mask)) == pytest.approx(mean)
    assert float(advantages.masked_std(kept, mask)) == pytest.approx(1)
    residual = [a - b for a, b, one in zip(*(z.flatten().tolist() for z in (x, y, mask)), strict=True) if one]
    shift = math.fsum(residual) / len(residual)
    unexplained = math.fsum((value - shift) ** 2 for value in residual) / (len(residual) - 1)
    explained = float(advantages.explained_variance(y, dirty, mask))
    assert explained == pytest.approx(1 - unexplained / std**2)


def test_whitening_within_kinds_is_whitening_of_each():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    mask = torch.rand(6, 5, generator=generator) < 0.7
    mask[5] = False
    kind = torch.tensor([0, 3, 0, 3, 0, 9])
    for keep_mean in (False, True):
        whole, std, centred = advantages.whiten(x, mask, keep_mean, kind)
        for each in (0, 3):
            rows = kind == each
            alone, _, _ = advantages.whiten(x[rows], mask[rows], keep_mean)
            torch.testing.assert_close(whole[rows], alone)
        assert not whole[5].any()
        assert std == advantages.masked_std(x, mask)
        assert not centred
    assert advantages.whiten(x.masked_fill((kind == 3)[:, None], 2.0), mask, kind=kind)[2], "one kind has no spread"
    assert not advantages.whiten(x, mask & False, kind=kind)[0].any()


@pytest.mark.parametrize("count", [1, 3])
def test_whitening_without_spread_only_centres(count):
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[0, :count] = True
    x = torch.full((2, 4), 123.4)
    whitened, std, centred = advantages.whiten(x, mask)
    assert bool(centred)
    assert float(std) < 1e-6
    assert torch.equal(whitened, torch.zeros(2, 4))
    kept, _, _ = advantages.whiten(x, mask, keep_mean=True)
    assert torch.equal(kept, torch.where(mask, x, 0.0))
    assert advantages.explained_variance(x, x, mask).isnan()


def test_spread_just_above_and_below_the_threshold():
    mask = torch.ones(1, 2, dtype=torch.bool)
    for step, expected in ((1.3e-6, True), (1.5e-6, False)):  # the std of two values is their distance / sqrt(2)
        _, _, centred = advantages.whiten(torch.tensor([[0.0, step]], dtype=torch.float64), mask)
        assert bool(centred) is expected

"""Statistics of groups, by hand and against Python's statistics."""

import statistics

import pytest
import torch

from mrlm_cli.formulas import advantages, groups

SCORES = torch.tensor([1.0, 0.0, 5.0, 0.0, 1.0, 7.0, float("nan")])
GROUP = torch.tensor([4, 4, 9, 4, 9, 2, 4])
INCLUDED = torch.tensor([True] * 6 + [False])


def test_by_hand():
    assert groups.size(GROUP, INCLUDED).tolist() == [3, 3, 2, 3, 2, 1, 0]
    third = pytest.approx(1 / 3)
    assert groups.mean(SCORES, GROUP, INCLUDED).tolist() == [third, third, 3, third, 3, 7, 0]
    assert groups.leave_one_out(SCORES, GROUP, INCLUDED).tolist() == [0, 0.5, 1, 0.5, 5, 7, 0]
    spread, wide = pytest.approx(statistics.stdev([1, 0, 0])), pytest.approx(statistics.stdev([5, 1]))
    assert groups.std(SCORES, GROUP, INCLUDED).tolist() == [spread, spread, wide, spread, wide, 0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_against_lists(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, generator=generator, dtype=torch.float64)
    group = torch.randint(-3, 5, (40,), generator=generator)
    included = torch.rand(40, generator=generator) < 0.7
    mean, others, std = (f(x, group, included) for f in (groups.mean, groups.leave_one_out, groups.std))
    for row in included.nonzero().flatten().tolist():
        mine = x[included & (group == group[row])].tolist()
        rest = [*mine]
        rest.remove(x[row].item())
        assert mean[row].item() == pytest.approx(statistics.fmean(mine), abs=1e-13)
        assert others[row].item() == pytest.approx(statistics.fmean(rest or mine), abs=1e-13)
        assert std[row].item() == pytest.approx(statistics.stdev(mine) if rest else 0.0, abs=1e-13)


def test_large_scores_of_little_spread_keep_their_deviation():
    x = torch.tensor([1e8, 1e8 + 1, 1e8 + 2], dtype=torch.float64)
    assert groups.std(x, torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool)).tolist() == [1, 1, 1]


def test_overlong_penalty_rises_over_the_buffer():
    length = torch.tensor([0, 12, 16, 17, 18, 20, 25])
    assert groups.overlong(length, 20, 4).tolist() == [0, 0, 0, 0.25, 0.5, 1, 1]


def test_reward_to_go_passes_over_what_is_not_chosen():
    rewards = torch.tensor([[9.0, 1.0, 9.0, 2.0, 4.0, 9.0], [0.0, 0.0, 0.0, 0.0, 0.0, 3.0]])
    mask = torch.tensor([[False, True, False, True, True, False], [False, True, False, False, False, True]])
    assert advantages.reward_to_go(rewards, mask).tolist() == [[0, 7, 0, 6, 4, 0], [0, 3, 0, 0, 0, 3]]

"""The sampler against the exact distribution."""

import math

import pytest
import torch

from mrlm_cli.draws import draw_key, uniforms
from mrlm_cli.engines.sampler import sample

pytestmark = pytest.mark.usefixtures("kernels")

LARGEST = 1 - 2.0**-53
EDGES = (0.0, 2.0**-53, 0.5, LARGEST)


def draws(rows):
    return torch.tensor(rows, dtype=torch.float64)


def ones(rows):
    return torch.ones(rows)


@pytest.mark.parametrize("words", [1, 2, 7, 50, 61])
def test_measure_of_every_word_is_its_probability(words):
    torch.manual_seed(words)
    logits = 2 * torch.randn(words)
    exact = torch.softmax(logits.double(), dim=0)
    grid = 400  # cell centres of a fine grid over both uniforms: every boundary moves a count by at most one line
    axis = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    tokens, _ = sample(logits.expand(grid**2, -1), ones(grid**2), torch.cartesian_prod(axis, axis))
    size = math.isqrt(words - 1) + 1
    measure = torch.bincount(tokens, minlength=words).double() / grid**2
    of_block = exact.split(size)[0].sum()
    assert abs(float(measure[:size].sum() - of_block)) <= 1 / grid
    torch.testing.assert_close(measure, exact, atol=2 / grid, rtol=0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_pass_chi_square(temperature):
    torch.manual_seed(0)
    words, count = 40, 40_000
    logits = 1.5 * torch.randn(words)
    drawn = draws([uniforms(draw_key("chi-square", row), row % 7) for row in range(count)])
    tokens, _ = sample(logits.expand(count, -1), torch.full((count,), temperature), drawn)
    expected = torch.softmax(logits.double() / temperature, dim=0) * count
    seen = torch.bincount(tokens, minlength=words).double()
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    seen = torch.cat([seen[~rare], seen[rare].sum()[None]])
    keep = expected > 0
    statistic = float(((seen - expected) ** 2 / expected)[keep].sum())
    freedom = int(keep.sum()) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("words", [2, 9, 10, 50, 1000])
def test_never_picks_a_word_of_probability_zero(words):
    torch.manual_seed(words)
    pairs = draws([(a, b) for a in EDGES for b in EDGES])
    for trial in range(20):
        logits = torch.randn(words)
        logits[torch.rand(words) < 0.6] = -torch.inf
        logits[trial % words] = 0.0
        logits[(trial + 1) % words] = -120.0  # exp underflows to zero in fp32
        tokens, logprobs = sample(logits.expand(len(pairs), -1), ones(len(pairs)), pairs)
        probabilities = torch.softmax(logits, dim=0)
        assert bool((probabilities[tokens] > 0).all())
        assert bool(torch.isfinite(logprobs).all())


def test_a_scan_that_is_not_monotone_picks_no_word_of_probability_zero(monkeypatch):
    exact = torch.Tensor.cumsum

    def wobbling(mass, dim):  # as a parallel scan may round: sums over nothing differ from the sum before
        return exact(mass, dim) + torch.where(mass > 0, 0.0, 1e-3)

    monkeypatch.setattr(torch.Tensor, "cumsum", wobbling)
    logits = torch.full((len(EDGES), 50), -torch.inf)
    logits[:, [9, 30, 31]] = 0.0
    tokens, _ = sample(logits, ones(len(EDGES)), draws([(edge, edge) for edge in EDGES]))
    assert set(tokens.tolist()) <= {9, 30, 31}
    assert tokens[0] == 9
    assert tokens[-1] == 31


@pytest.mark.parametrize("words", [1, 5, 49, 50])
def test_one_hot_is_always_picked(words):
    for target in range(words):
        logits = torch.full((len(EDGES), words), -torch.inf)
        logits[:, target] = 3.0
        tokens, logprobs = sample(logits, ones(len(EDGES)), draws([(edge, edge) for edge in EDGES]))
        assert tokens.tolist() == [target] * len(EDGES)
        assert logprobs.tolist() == [0.0] * len(EDGES)


def test_first_and_last_words_are_reached():
    logits = torch.zeros(2, 10)
    tokens, _ = sample(logits, ones(2), draws([(0.0, 0.0), (LARGEST, LARGEST)]))
    assert tokens.tolist() == [0, 9]


def test_temperatures_of_rows_differ_and_zero_is_greedy():
    torch.manual_seed(1)
    logits = torch.randn(4, 33)
    temperature = torch.tensor([0.0, 0.5, 1.0, 3.0])
    drawn = draws([(0.9, 0.9)] * 4)
    tokens, logprobs = sample(logits, temperature, drawn)
    assert int(tokens[0]) == int(logits[0].argmax())
    for row, scoring in enumerate((1.0, 0.5, 1.0, 3.0)):
        alone, _ = sample(logits[row : row + 1], temperature[row : row + 1], drawn[:1])
        assert int(alone) == int(tokens[row])
        expected = torch.log_softmax(logits[row].float() / scoring, dim=-1)[tokens[row]]
        assert abs(float(expected - logprobs[row])) < 2e-6


def test_bfloat16_logits_are_scored_in_float32():
    torch.manual_seed(2)
    logits = torch.randn(3, 300).bfloat16()
    tokens, logprobs = sample(logits, ones(3), draws([(0.3, 0.7)] * 3))
    expected = torch.log_softmax(logits.float(), dim=-1).gather(1, tokens[:, None])[:, 0]
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", ["nan", "inf", "nothing"])
def test_rows_without_a_distribution_get_nan_and_leave_the_others_alone(temperature, bad):
    torch.manual_seed(3)
    logits = torch.randn(3, 20)
    clean = sample(logits, torch.full((3,), temperature), draws([(0.2, 0.6)] * 3))
    if bad == "nothing":
        logits[1] = -torch.inf
    else:
        logits[1, 4] = float(bad)
    tokens, logprobs = sample(logits, torch.full((3,), temperature), draws([(0.2, 0.6)] * 3))
    assert logprobs.isnan().tolist() == [False, True, False]
    for row in (0, 2):
        assert tokens[row] == clean[0][row]
        assert logprobs[row] == clean[1][row]


def test_enormous_logits_and_tails_do_not_overflow():
    logits = torch.tensor([[1e30, -1e30, 1e30, 0.0]])
    tokens, logprobs = sample(logits, ones(1), draws([(0.9, 0.1)]))
    assert tokens.tolist() == [2]
    assert float(logprobs[0]) == pytest.approx(-math.log(2), abs=1e-6)

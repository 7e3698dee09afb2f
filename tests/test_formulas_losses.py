"""Losses, KL estimates and weights: hand values, slow references in Python floats, finite differences."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mrlm_cli.formulas import kl, losses, weights

number = st.floats(-3, 3, allow_nan=False)


def one(x):
    return torch.tensor([[x]], dtype=torch.float64)


def slow_surrogate(logprob, old, advantage, low, high, dual_clip):
    ratio = math.exp(logprob - old)
    loss = max(-advantage * ratio, -advantage * min(max(ratio, 1 - low), 1 + high))
    return min(loss, -advantage * dual_clip) if dual_clip is not None and advantage < 0 else loss


@given(number, number, number, st.floats(0.05, 1), st.floats(0.05, 2), st.none() | st.floats(1.1, 5))
@settings(max_examples=150, deadline=None)
def test_clipped_surrogate_against_scalars(logprob, old, advantage, low, high, dual_clip):
    found = losses.clipped_surrogate(one(logprob), one(old), one(advantage), low, high, dual_clip).item()
    assert found == pytest.approx(slow_surrogate(logprob, old, advantage, low, high, dual_clip), abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual_clip", "loss", "slope"),
    [
        (1.0, 2.0, None, -2.0, -2.0),  # slope is d loss / d logprob = d loss / d ρ · ρ
        (1.25, 2.0, None, -2.5, -2.5),  # above 1 + 0.2 but below the higher bound 1 + 0.3
        (1.5, 2.0, None, -2.6, 0.0),
        (0.5, 2.0, None, -1.0, -1.0),  # a good token that became rarer is always pushed
        (0.5, -2.0, None, 1.6, 0.0),
        (0.85, -2.0, None, 1.7, 1.7),
        (5.0, -2.0, None, 10.0, 10.0),  # a bad token that became likelier: unbounded without the dual clip
        (5.0, -2.0, 3.0, 6.0, 0.0),
        (2.5, -2.0, 3.0, 5.0, 5.0),
        (5.0, 2.0, 3.0, -2.6, 0.0),
    ],
)
def test_asymmetric_and_dual_clip_by_hand(ratio, advantage, dual_clip, loss, slope):
    logprob = one(math.log(ratio)).requires_grad_()
    found = losses.clipped_surrogate(logprob, one(0.0), one(advantage), 0.2, 0.3, dual_clip)
    (gradient,) = torch.autograd.grad(found.sum(), logprob)
    assert (found.item(), gradient.item()) == (pytest.approx(loss), pytest.approx(slope))


def test_clipped_marks_ratios_outside_the_range():
    ratios = torch.tensor([[0.79, 0.81, 1.0, 1.29, 1.31]]).log()
    assert losses.clipped(ratios, torch.zeros(1, 5), 0.2, 0.3).tolist() == [[True, False, False, False, True]]


def test_log_ratio_is_clamped_and_nan_stays():
    found = losses.log_ratio(torch.tensor([[500.0, -500.0, 19.0, torch.nan]]), torch.zeros(1, 4))
    assert found[0, :3].tolist() == [20.0, -20.0, 19.0]
    assert found[0, 3].isnan()
    surrogate = losses.clipped_surrogate(torch.tensor([[500.0]]), torch.zeros(1, 1), -torch.ones(1, 1), 0.2, 0.2)
    assert surrogate.isfinite().all()


@given(number, number, number, st.none() | st.floats(0.05, 2))
@settings(max_examples=100, deadline=None)
def test_value_loss_against_scalars(value, old, target, clip):
    expected = 0.5 * (value - target) ** 2
    if clip is not None:
        near = min(max(value, old - clip), old + clip)
        expected = max(expected, 0.5 * (near - target) ** 2)
    assert losses.value_loss(one(value), one(old), one(target), clip).item() == pytest.approx(expected, abs=1e-12)


@given(number, number)
@settings(max_examples=100, deadline=None)
def test_kl_estimates_against_scalars(logprob, ref):
    difference = logprob - ref
    assert kl.k1(one(logprob), one(ref)).item() == pytest.approx(difference, abs=1e-14)
    assert kl.k2(one(logprob), one(ref)).item() == pytest.approx(difference**2 / 2, abs=1e-14)
    expected = math.exp(-difference) - 1 + difference
    assert kl.k3(one(logprob), one(ref)).item() == pytest.approx(expected, abs=1e-11)
    assert kl.k3_plus(one(logprob), one(ref)).item() == pytest.approx(expected, abs=1e-11)
    moved = math.exp(difference) - 1 - difference  # approx_kl(new, old) is k3 with the roles changed
    assert losses.approx_kl(one(logprob), one(ref)).item() == pytest.approx(moved, abs=1e-11)


def test_finite_differences():
    generator = torch.Generator().manual_seed(0)
    x, y, z = (torch.randn(3, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    x.requires_grad_()
    for formula in (
        lambda x: losses.clipped_surrogate(x, y, z, 0.2, 0.3),
        lambda x: losses.clipped_surrogate(x, y, z, 0.2, 0.3, 1.7),
        lambda x: losses.value_loss(x, y, z, None),
        lambda x: losses.value_loss(x, y, z, 0.4),
        lambda x: losses.approx_kl(x, y),
        lambda x: kl.k2(x, y),
        lambda x: kl.k3(x, y),
    ):
        assert torch.autograd.gradcheck(formula, x)


def test_k3_plus_has_the_gradient_of_k2():
    x, y = torch.tensor([[-1.0, -2.5, 0.3]]).requires_grad_(), torch.tensor([[-1.4, -2.0, -0.3]])
    (found,) = torch.autograd.grad(kl.k3_plus(x, y).sum(), x)
    (expected,) = torch.autograd.grad(kl.k2(x, y).sum(), x)
    assert torch.equal(found, expected)
    assert not torch.equal(found, torch.autograd.grad(kl.k3(x, y).sum(), x)[0])


def test_expected_gradients_of_the_kl_estimates():
    """Exact expectation over a small vocabulary: k1 has none, k2 that of KL(π‖ref), k3 that of KL(ref‖π)."""
    generator = torch.Generator().manual_seed(1)
    logits, other = torch.randn(2, 5, dtype=torch.float64, generator=generator)
    logits.requires_grad_()
    log_p, log_ref = torch.log_softmax(logits, 0), torch.log_softmax(other, 0)
    p, ref = log_p.exp().detach(), log_ref.exp()

    def expected_gradient(estimate):
        (gradient,) = torch.autograd.grad(
            (p * estimate(log_p[None], log_ref[None])[0]).sum(), logits, retain_graph=True
        )
        return gradient

    (forward,) = torch.autograd.grad((log_p.exp() * (log_p - log_ref)).sum(), logits, retain_graph=True)
    (reverse,) = torch.autograd.grad((ref * (log_ref - log_p)).sum(), logits, retain_graph=True)
    torch.testing.assert_close(expected_gradient(kl.k1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(expected_gradient(kl.k2), forward)
    torch.testing.assert_close(expected_gradient(kl.k3_plus), forward)
    torch.testing.assert_close(expected_gradient(kl.k3), reverse)


MASK = torch.tensor([[0, 1, 1, 0, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
INCLUDED = torch.tensor([True, True, True, False])


def test_token_weights():
    found, mass = weights.token(MASK, INCLUDED, torch.float64)
    assert found.tolist() == [[0, 1, 1, 0, 1], [0, 1, 0, 0, 0], [0] * 5, [0] * 5]
    assert mass.tolist() == [3, 1, 0, 0]


def test_sequence_weights():
    found, mass = weights.sequence(MASK, INCLUDED, torch.float64)
    third = 1 / 3
    assert found.tolist() == [[0, third, third, 0, third], [0, 1, 0, 0, 0], [0] * 5, [0] * 5]
    assert mass.tolist() == [1, 1, 0, 0]


def test_constant_weights():
    found, mass = weights.constant(MASK, INCLUDED, torch.float32, 8)
    assert found.tolist() == [[0, 1, 1, 0, 1], [0, 1, 0, 0, 0], [0] * 5, [0] * 5]
    assert mass.tolist() == [8, 8, 0, 0]
    assert found.dtype == mass.dtype == torch.float32


def test_importance_weights_carry_no_gradient_and_do_not_overflow():
    old = torch.tensor([[math.log(0.5), math.log(0.9), 0.0, 300.0, math.nan]]).requires_grad_()
    sampler = torch.tensor([[math.log(0.25), math.log(0.9), math.log(0.1), -300.0, 0.0]])
    mask = torch.tensor([[True, True, True, True, False]])
    found = weights.importance(old, sampler, mask, False)
    torch.testing.assert_close(found, torch.tensor([[2.0, 1.0, 10.0, math.exp(20.0), 1.0]]))
    assert not found.requires_grad
    whole = weights.importance(old, sampler, mask & (torch.arange(5) < 3), True)
    torch.testing.assert_close(whole, torch.tensor([[20.0, 20.0, 20.0, 1.0, 1.0]]))


def test_bounded_weights():
    x = torch.tensor([[0.1, 0.5, 1.0, 3.0, 3.1]])
    truncated, outside = weights.bounded(x, 0.5, 3.0, mask=False)
    assert torch.equal(truncated, torch.tensor([[0.5, 0.5, 1.0, 3.0, 3.0]]))
    masked, same = weights.bounded(x, 0.5, 3.0, mask=True)
    assert torch.equal(masked, torch.tensor([[0.0, 0.5, 1.0, 3.0, 0.0]]))
    assert outside.tolist() == same.tolist() == [[True, False, False, False, True]]


def test_sequence_log_ratios():
    new, old = torch.tensor([[1.0, 2.0, 4.0], [5.0, 5.0, 5.0]]), torch.tensor([[0.5, 9.0, 1.0], [1.0, 1.0, 1.0]])
    mask = torch.tensor([[True, False, True], [False, False, False]])
    assert losses.sequence_log_ratio(new, old, mask, mean=False).tolist() == [[3.5, 0, 3.5], [0, 0, 0]]
    assert losses.sequence_log_ratio(new, old, mask, mean=True).tolist() == [[1.75, 0, 1.75], [0, 0, 0]]


def test_cispo_keeps_the_gradient_of_every_token_and_bounds_its_weight():
    logprobs = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    ratios = torch.tensor([[math.log(9.0), math.log(0.5), math.log(0.01)]])
    advantages = torch.tensor([[1.0, -1.0, 2.0]])
    for low, expected in ((1.0, [-5.0, 0.5, -0.02]), (0.3, [-5.0, 0.7, -1.4])):
        loss = losses.cispo(logprobs, ratios, advantages, low, 4.0)
        (slope,) = torch.autograd.grad(loss.sum(), logprobs)
        torch.testing.assert_close(slope, torch.tensor([expected]))
        torch.testing.assert_close(loss, slope * logprobs)


def test_unclipped_loss():
    ratios = torch.tensor([[math.log(9.0), 400.0]])
    found = losses.importance_weighted(ratios, torch.tensor([[2.0, -1.0]]))
    torch.testing.assert_close(found, torch.tensor([[-18.0, math.exp(20.0)]]))


def test_the_package_and_the_algorithm_import_no_torch():
    program = (
        "import sys, mrlm_cli.formulas, mrlm_cli.algorithms.ppo, mrlm_cli.algorithms.group\n"
        "assert 'torch' not in sys.modules\n"
        "mrlm_cli.formulas.losses.value_loss\n"
        "assert 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_unknown_formula_module_is_an_attribute_error():
    import mrlm_cli.formulas

    with pytest.raises(AttributeError, match="nothing"):
        _ = mrlm_cli.formulas.nothing

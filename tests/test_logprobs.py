"""Chunked log-probs and entropies against the full log-softmax, values and gradients."""

import math

import pytest
import torch

from mrlm_cli.kernels import logprobs
from mrlm_cli.kernels.logprobs import chunked_logprobs
from mrlm_cli.recipe import derived

pytestmark = pytest.mark.usefixtures("kernels")


def reference(hidden, targets, head, temperature):
    log_p = torch.log_softmax(head(hidden) / temperature, dim=-1)
    chosen = log_p.gather(-1, targets[:, None])[:, 0]
    return chosen, -(log_p.exp() * log_p).sum(-1)


def problem(rows, seed=0, vocabulary=11, width=5):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, width, dtype=torch.float64, generator=generator).requires_grad_()
    bias = torch.randn(vocabulary, dtype=torch.float64, generator=generator).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    upstream = torch.randn(2, rows, dtype=torch.float64, generator=generator)
    return hidden, weight, bias, targets, upstream


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_equals_full_log_softmax_in_values_and_gradients(monkeypatch, chunk_rows, temperature, cap):
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 11 * chunk_rows + 4)
    hidden, weight, bias, targets, upstream = problem(rows=13)
    sizes = []

    def head(chunk):
        sizes.append(len(chunk))
        logits = torch.nn.functional.linear(chunk, weight, bias)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    found = chunked_logprobs(hidden, targets, head, 11, temperature, True)
    found_gradients = torch.autograd.grad(found, (hidden, weight, bias), tuple(upstream))
    assert max(sizes) == min(chunk_rows, 13)
    assert sum(sizes) == (13 if chunk_rows == 100 else 26)  # one chunk is not computed twice, several are
    expected = reference(hidden, targets, head, temperature)
    expected_gradients = torch.autograd.grad(expected, (hidden, weight, bias), tuple(upstream))
    for left, right in zip((*found, *found_gradients), (*expected, *expected_gradients), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("entropy", [True, False])
def test_finite_differences(monkeypatch, entropy):
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 22)
    hidden, weight, bias, targets, _ = problem(rows=4)

    def scored(hidden, weight, bias):
        found = chunked_logprobs(hidden, targets, lambda x: x @ weight.T + bias, 11, 1.3, entropy)
        return found if entropy else found[0]

    assert torch.autograd.gradcheck(scored, (hidden, weight, bias))


def test_no_gradient_path_and_entropy_not_asked_for(monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 33)
    hidden, weight, _, targets, _ = problem(rows=10)
    with torch.no_grad():
        found, zeros = chunked_logprobs(hidden, targets, lambda x: x @ weight.T, 11, 1.0, False)
        expected, _ = reference(hidden, targets, lambda x: x @ weight.T, 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(zeros, torch.zeros(10, dtype=torch.float64))


def test_no_rows_reach_the_head_with_zero_gradient():
    hidden, weight, _, targets, _ = problem(rows=0)
    found, entropy = chunked_logprobs(hidden, targets, lambda x: x @ weight.T, 11, 1.0, True)
    assert found.shape == entropy.shape == (0,)
    (found.sum() + entropy.sum()).backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_softmax_is_in_fp32_for_bfloat16_logits():
    generator = torch.Generator().manual_seed(3)
    logits = (4 * torch.randn(6, 300, generator=generator)).bfloat16().requires_grad_()
    targets = torch.arange(6)
    found, entropy = chunked_logprobs(logits, targets, lambda x: x, 300, 0.9, True)
    assert found.dtype == entropy.dtype == torch.float32
    expected, expected_entropy = reference(logits.detach().double(), targets, lambda x: x, 0.9)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert gradient.dtype == torch.bfloat16


def test_a_nearly_certain_word_keeps_its_small_log_probability():
    logits = torch.tensor([[40.0, 30.0]])  # max + log(Σ) rounded at 40 would be off by up to 2e-6
    found, entropy = chunked_logprobs(logits, torch.tensor([0]), lambda x: x, 2, 1.0, True)
    assert found.item() == pytest.approx(-math.log1p(math.exp(-10.0)), abs=1.2e-7)
    assert entropy.item() == pytest.approx(11 * math.exp(-10.0), abs=1e-6)


def test_nan_is_not_hidden_and_minus_infinity_is_probability_zero():
    logits = torch.tensor([[0.0, float("nan"), 1.0], [0.0, float("-inf"), 0.0]]).requires_grad_()
    found, entropy = chunked_logprobs(logits, torch.tensor([0, 2]), lambda x: x, 3, 1.0, True)
    assert found[0].isnan()
    assert entropy[0].isnan()
    assert found[1].item() == pytest.approx(-math.log(2))
    assert entropy[1].item() == pytest.approx(math.log(2))
    (gradient,) = torch.autograd.grad((found[1], entropy[1]), logits, (torch.tensor(1.0), torch.tensor(1.0)))
    torch.testing.assert_close(gradient[1], torch.tensor([-0.5, 0.0, 0.5]))


def test_chunks_under_autocast_have_the_gradient_of_one_chunk(monkeypatch):
    """The recomputed chunk must run in bf16 like the first one, although the backward pass is outside of autocast."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(12, 8, generator=generator).requires_grad_()
    linear = torch.nn.Linear(8, 40, bias=False)
    linear.weight.data = torch.randn(40, 8, generator=generator)
    targets = torch.arange(12)
    results = []
    for rows in (12, 5):
        monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 40 * rows)
        with torch.autocast("cpu", torch.bfloat16):
            found = chunked_logprobs(hidden, targets, linear, 40, 1.0, True)
        assert found[0].dtype == found[1].dtype == torch.float32
        gradients = torch.autograd.grad(found, (hidden, linear.weight), (torch.ones(12), torch.ones(12)))
        results.append((*found, *gradients))
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=2e-2, atol=2e-2)
    exact = reference(hidden.double(), targets, lambda x: x @ linear.weight.double().T, 1.0)[0]
    assert (results[0][0].double() - exact).abs().max() > 1e-4  # the product really was in bf16


def test_the_memory_estimate_knows_the_size_of_a_chunk():
    assert derived._CHUNK_LOGITS == logprobs.CHUNK_LOGITS  # a recipe may not import formulas, so it is said twice

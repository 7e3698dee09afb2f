"""The packed trunk of Llama-shaped models: equal to transformers' own forward, gradients included."""

import statistics

import pytest
import torch
from torch import nn

from mrlm_cli.kernels import llama, parameters
from mrlm_cli.kernels.functions import Linear, NormLinear, SwiGLULinear, gather, spread
from mrlm_cli.kernels.llama import Rotate, Trunk
from mrlm_cli.kernels.low_rank import Matrix
from mrlm_cli.kernels.packing import pack
from mrlm_cli.kernels.parameters import factor
from mrlm_cli.kernels.products import FrozenLinear
from mrlm_cli.policy.trunk import checkpoint_activations, run_trunk
from tests.test_policy_families import VOCABULARY, tiny

pytestmark = pytest.mark.usefixtures("kernels")

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROWS, LONGEST = 6, 14


def batch(seed=1):
    """Rows of several lengths; some begin alike, two are equal."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, VOCABULARY, (ROWS, LONGEST), generator=generator)
    tokens[1, :7] = tokens[0, :7]
    tokens[4, :9] = tokens[0, :9]
    tokens[5] = tokens[2]
    lengths = torch.tensor([14, 12, 14, 9, 13, 14])
    score = torch.rand(ROWS, LONGEST, generator=generator) < 0.5
    score[:, 0] = False
    return tokens, lengths, score & (torch.arange(LONGEST) < lengths[:, None])


def policy(family, **given):
    made = tiny(family, **given)
    made.lm.config.sliding_window = None  # Mistral's; a window is refused by the packed trunk
    return made


def outcome(policy, tokens, lengths, score):
    """(log-probs, entropies, values, gradient of a loss that tells every place apart)."""
    policy.zero_grad()
    out = policy(tokens, lengths, score, temperature=0.7)
    weight = torch.arange(tokens.numel()).view(tokens.shape) / 50
    loss = (weight * (out.logprobs + out.entropy + out.values)).sum() + (out.final_values * lengths).sum()
    loss.backward()
    gradient = torch.cat([each.grad.flatten().double() for each in policy.parameters()])
    return out.logprobs.detach(), out.entropy.detach(), out.values.detach(), gradient


@pytest.fixture
def as_transformers(monkeypatch):
    def switch():
        monkeypatch.setattr(Trunk, "of", staticmethod(lambda model: None))

    return switch


@pytest.mark.parametrize("written_out", [llama.WRITTEN_OUT, 0])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_transformers(family, written_out, as_transformers, monkeypatch):
    monkeypatch.setattr(llama, "WRITTEN_OUT", written_out)
    given = batch()
    packed = policy(family)
    assert Trunk.of(packed.lm.base_model) is not None
    found = outcome(packed, *given)
    as_transformers()
    expected = outcome(policy(family), *given)
    for one, other in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)
    assert (found[3] - expected[3]).norm() / expected[3].norm() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_nearer_to_float32_than_transformers_is(family, as_transformers):
    batches = [batch(seed) for seed in range(1, 5)]
    exact = [outcome(policy(family), *given) for given in batches]
    packed = [outcome(policy(family, precision="bfloat16"), *given) for given in batches]
    as_transformers()
    theirs = [outcome(policy(family, precision="bfloat16"), *given) for given in batches]

    def distance(found):
        errors = [((one[3] - true[3]).norm() / true[3].norm()).item() for one, true in zip(found, exact, strict=True)]
        return statistics.median(errors)

    assert 1e-4 < distance(packed) < 0.05
    assert distance(packed) < 1.2 * distance(theirs)


@pytest.mark.parametrize("written_out", [llama.WRITTEN_OUT, 0])
def test_checkpointing_changes_nothing(written_out, monkeypatch):
    monkeypatch.setattr(llama, "WRITTEN_OUT", written_out)
    given = batch()
    plain, saving = policy("qwen3", precision="bfloat16"), policy("qwen3", precision="bfloat16")
    checkpoint_activations(saving.lm)
    assert Trunk.of(saving.lm.base_model) is not None
    for one, other in zip(outcome(plain, *given), outcome(saving, *given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_weights_converted_once_change_no_bit_and_are_not_remembered(precision):
    given = batch()
    made = policy("qwen2", precision=precision)
    plain = outcome(made, *given)
    with made.steady():
        twice = [outcome(made, *given) for _ in range(2)]
    assert all(torch.equal(one, other) for found in twice for one, other in zip(plain, found, strict=True))
    with torch.no_grad():
        for each in made.lm.parameters():
            each.mul_(1.1)
    moved = outcome(made, *given)
    with made.steady():
        assert all(torch.equal(one, other) for one, other in zip(moved, outcome(made, *given), strict=True))
    assert not torch.equal(moved[0], plain[0])


def accumulated(made, parts, **how):
    """`.grad` by name after a backward pass of each part."""
    made.zero_grad()
    with made.steady(**how):
        for tokens, lengths, score in parts:
            out = made(tokens, lengths, score, temperature=0.7)
            weight = torch.arange(tokens.numel()).view(tokens.shape) / 50
            (weight * (out.logprobs + out.entropy + out.values)).sum().backward()
    return {name: None if each.grad is None else each.grad.clone() for name, each in made.named_parameters()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])  # the first two have one table for words and head
def test_gradients_added_where_they_arise_are_those_of_autograd(family, precision, monkeypatch):
    monkeypatch.setattr(parameters, "_ROWS", 5)  # several blocks, the last one short
    made = policy(family, precision=precision)
    head, words = made.lm.get_output_embeddings().weight, made.lm.get_input_embeddings().weight
    assert (head is words) == (family != "qwen3")
    frozen = made.lm.base_model.layers[1].mlp.down_proj.weight.requires_grad_(False)
    parts = [batch(seed) for seed in (1, 2, 3)]
    expected, found = accumulated(made, parts), accumulated(made, parts, adds=True)
    assert frozen.grad is None
    assert sum(each is not None for each in found.values()) > 20
    for name, each in expected.items():
        if each is None:
            assert found[name] is None
        else:  # sums of three in another order
            torch.testing.assert_close(found[name], each, rtol=1e-5, atol=1e-6 * each.abs().max().item())


@pytest.mark.parametrize("written_out", [llama.WRITTEN_OUT, 0])
def test_a_row_knows_nothing_of_its_neighbours(written_out, monkeypatch):
    """Whatever else is in the batch, shared beginnings included, a row's results are its own."""
    monkeypatch.setattr(llama, "WRITTEN_OUT", written_out)
    tokens, lengths, score = batch()
    made = policy("llama").double()
    together = made(tokens, lengths, score, temperature=1.0)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = made(tokens[order], lengths[order], score[order], temperature=1.0)
    for row in range(ROWS):
        one = slice(row, row + 1)
        width = lengths[row]
        alone = made(tokens[one, :width], lengths[one], score[one, :width], temperature=1.0)
        torch.testing.assert_close(alone.logprobs[0], together.logprobs[row, :width], rtol=0, atol=1e-6)
        torch.testing.assert_close(alone.final_values[0], together.final_values[row], rtol=0, atol=1e-6)
    torch.testing.assert_close(shuffled.logprobs, together.logprobs[order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_states_are_there_where_they_are_wanted_and_nowhere_else(checkpointing):
    tokens, lengths, wanted = batch()
    made = policy("llama")
    if checkpointing:
        checkpoint_activations(made.lm)
    trunk = made.lm.base_model
    real = torch.arange(LONGEST) < lengths[:, None]
    every = run_trunk(trunk, tokens, lengths, "float32", real)
    some = run_trunk(trunk, tokens, lengths, "float32", wanted)
    assert len(some.hidden) < len(every.hidden)
    torch.testing.assert_close(some.at(*wanted.nonzero().T), every.at(*wanted.nonzero().T), rtol=1e-5, atol=1e-6)
    row, column = (real & ~wanted & ~torch.isin(some.node, some.node[wanted])).nonzero()[0]
    with pytest.raises(IndexError):
        some.at(row[None], column[None])


def test_packing_is_the_prefix_tree():
    tokens, lengths, _ = batch()
    packing = pack(tokens, lengths)
    prefixes = {}
    for row, length in enumerate(lengths.tolist()):
        for column in range(length):
            prefix = tuple(tokens[row, : column + 1].tolist())
            node = int(packing.node[row, column])
            assert prefixes.setdefault(prefix, node) == node
            assert int(packing.tokens[node]) == prefix[-1]
            assert int(packing.positions[node]) == column
    assert sorted(prefixes.values()) == list(range(len(packing.owner)))
    assert len(prefixes) < int(lengths.sum())
    for node, place in enumerate(packing.owner.tolist()):
        assert int(packing.node.flatten()[place]) == node
    assert not packing.plain


def test_packing_of_distinct_full_rows_is_plain():
    tokens = torch.tensor([[1, 5, 5], [2, 5, 5], [3, 1, 1]])
    packing = pack(tokens, torch.tensor([3, 3, 3]))
    assert packing.plain
    assert torch.equal(packing.node.flatten(), torch.arange(9))
    unsorted = pack(tokens[[2, 0, 1]], torch.tensor([3, 3, 3]))
    assert not unsorted.plain  # correct all the same, by way of the index
    assert torch.equal(unsorted.tokens[unsorted.node], tokens[[2, 0, 1]])


def test_a_shared_place_gets_the_sum_of_its_gradients():
    tokens, lengths, _ = batch()
    packing = pack(tokens, lengths)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(packing.owner), 3, dtype=torch.float64, generator=generator)
    rows = torch.randn(packing.node.numel(), 3, dtype=torch.float64, generator=generator)
    rows[(torch.arange(LONGEST) >= lengths[:, None]).flatten()] = 0
    assert torch.isclose((spread(x, packing) * rows).sum(), (x * gather(rows, packing)).sum())  # each other's adjoint


@pytest.mark.parametrize("bias", [False, True])
def test_finite_differences(bias):
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()

    def check(function, *given, parts):
        """With a factor of these parts."""

        def called(*given):
            weight = factor(torch.float64, *given[-len(parts) :])
            return function.apply(*given[: -len(parts)], *extra, weight, *weight.parts)

        extra = (1e-5,) if function is NormLinear else ()
        assert torch.autograd.gradcheck(called, (*given, *parts))

    check(NormLinear, drawn(5, 6), drawn(6), drawn(4) if bias else None, parts=(drawn(3, 6), drawn(1, 6)))
    check(Linear, drawn(5, 6), parts=(drawn(4, 6),))
    check(SwiGLULinear, drawn(5, 8), parts=(drawn(3, 4),))
    angles = torch.randn(5, 2, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(lambda x: Rotate.apply(x, angles.cos(), angles.sin()), (drawn(5, 3, 4),))


def test_large_products_agree_with_the_plain_ones():
    """Large enough for oneDNN, where there is one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 256, generator=generator, requires_grad=True)
    weight = torch.randn(192, 256, generator=generator, requires_grad=True)
    given = torch.randn(128, 192, generator=generator)
    Linear.apply(x, factor(weight.dtype, weight), weight).backward(given)
    double = x.detach().double(), weight.detach().double(), given.double()
    torch.testing.assert_close(x.grad, (double[2] @ double[1]).float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(weight.grad, (double[2].t() @ double[0]).float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda model: setattr(model.config, "sliding_window", 4),
        lambda model: setattr(model.config, "hidden_act", "gelu"),
        lambda model: model.config.rope_parameters.update(rope_type="dynamic"),
        lambda model: model.layers[1].mlp.register_forward_hook(lambda *_: None),
        lambda model: setattr(model.layers[0].self_attn, "o_proj", nn.Linear(32, 32)),
        lambda model: setattr(model.layers[0].mlp, "up_proj", nn.Sequential(model.layers[0].mlp.up_proj)),
    ],
)
def test_whatever_is_not_exactly_of_this_shape_is_left_to_transformers(spoil):
    model = policy("llama").lm.base_model
    assert Trunk.of(model) is not None
    spoil(model)
    assert Trunk.of(model) is None
    assert Trunk.of(tiny("gemma").lm.base_model) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wide", [16, 512])  # too small for a layout of its own, and large enough
def test_frozen_products_take_present_weights_when_told(dtype, wide):
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(rows, wide, generator=generator) for rows in (96, 64)]
    biases = [torch.randn(rows, generator=generator) for rows in (96, 64)]
    x = torch.randn(7, wide, generator=generator).to(dtype)
    frozen = FrozenLinear([Matrix(part) for part in parts], biases, dtype)
    frozen.load()

    def expected():
        weight, bias = torch.cat(parts).to(dtype), torch.cat(biases).to(dtype)
        return (x.double() @ weight.double().t() + bias.double()).to(dtype)

    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.3, torch.float64: 1e-10}[dtype]
    first = frozen(x)
    torch.testing.assert_close(first, expected(), rtol=1e-2 if dtype == torch.bfloat16 else 0, atol=tolerance)
    parts[1].mul_(-1)
    assert torch.equal(frozen(x), first)
    frozen.load()
    torch.testing.assert_close(frozen(x), expected(), rtol=1e-2 if dtype == torch.bfloat16 else 0, atol=tolerance)

"""The kernels in C against torch's operators and float64, and what happens where they cannot be had."""

import math

import pytest
import torch

from mrlm_cli.engines.sampler import sample
from mrlm_cli.envs.host import NoJournal
from mrlm_cli.errors import UserError
from mrlm_cli.kernels import attention, between, build, native, products, slots
from mrlm_cli.kernels.attention import Attention, FusedAttention, Heads, library_for
from mrlm_cli.kernels.llama import Trunk
from mrlm_cli.kernels.logprobs import chunked_logprobs
from mrlm_cli.kernels.low_rank import Adapter, Matrix
from mrlm_cli.kernels.packing import pack
from mrlm_cli.kernels.products import FrozenLinear
from mrlm_cli.training.stage import Stage, settled
from tests import engine_helpers
from tests.kit import tiny

TYPES = [torch.float32, torch.bfloat16]
# Of the largest number: float32 sums in another order; bfloat16 is rounded once, to 8 bits.
NEAR = {torch.float32: 2e-6, torch.bfloat16: 2**-8}

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"no kernels: {native.missing()}")


@pytest.fixture(autouse=True)
def switched_on(as_before):
    native.use(True)


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def numbers(*shape, seed=0, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def near(found, exact, dtype):
    exact = exact.double()
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() <= NEAR[dtype] * exact.abs().max()


def both_ways(function, *given, **named):
    """What the kernels give, and torch's operators in float64."""
    found = function(*given, **named)
    wide = [each.double() if torch.is_tensor(each) and each.is_floating_point() else each for each in given]
    assert native.on(*(each for each in wide if torch.is_tensor(each) and each.is_floating_point())) is None
    return found, function(*wide, **named)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 37), (90, 128)])
def test_norm(dtype, rows, width, threads):
    x, gain = numbers(rows, width), numbers(width, seed=1)
    y, scale = between.rms_norm(x, gain, 1e-5, dtype)
    exact, exact_scale = between.rms_norm(x.double(), gain.double(), 1e-5, torch.float64)
    near(y, exact, dtype)
    near(scale, exact_scale, torch.float32)

    addend = numbers(rows, width, seed=2, dtype=dtype)
    total, normed = between.add_rms_norm(x.clone(), addend, gain, 1e-5, dtype)
    assert torch.equal(total, x + addend)
    near(normed, between.rms_norm(total.double(), gain.double(), 1e-5, torch.float64)[0], dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("more", [False, True])
def test_norm_backward(dtype, more, threads):
    x, gain = numbers(90, 128), numbers(128, seed=1)
    of_y = numbers(90, 128, seed=2, dtype=dtype)
    besides = numbers(90, 128, seed=3, dtype=dtype) if more else None
    scale = between.rms_norm(x, gain, 1e-5, dtype)[1]
    found, exact = both_ways(between.rms_norm_backward, of_y, besides, x, gain, scale, again=True)
    near(found[0], exact[0], torch.float32)
    near(found[1], exact[1], torch.float32)
    near(found[2], exact[2], dtype)
    assert between.rms_norm_backward(of_y, besides, x, gain, scale, again=False)[2] is None


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 19), (64, 256)])
def test_swiglu(dtype, more, rows, width, threads):
    both = numbers(rows, 2 * width, dtype=dtype, scale=4)
    found, exact = both_ways(between.swiglu, both)
    near(found, exact, dtype)
    of_y = numbers(rows, width, seed=1, dtype=dtype)
    besides = numbers(rows, width, seed=2, dtype=dtype) if more else None
    found, exact = both_ways(between.swiglu_backward, of_y, besides, both, again=True)
    near(found[0], exact[0], dtype)
    near(found[1], exact[1], dtype)


def rows_alike(longest):
    """Rows of several lengths that begin alike, two of them equal, one of a single token."""
    tokens = torch.randint(0, 50, (6, longest), generator=torch.Generator().manual_seed(3))
    tokens[:, 0] = torch.arange(6)
    tokens[1, : longest // 2], tokens[4, : longest * 2 // 3], tokens[3] = (
        tokens[0, : longest // 2],
        tokens[0, : longest * 2 // 3],
        tokens[2],
    )
    return pack(tokens, torch.tensor([longest, longest * 2 // 3, longest - 1, longest - 1, longest, 1]))


def rows_apart(longest):
    tokens = torch.arange(5)[:, None].expand(5, longest)
    return pack(tokens, torch.full((5,), longest))


def attended(projected, cos, sin, packing, heads, weight):
    """(outcome, gradient of the projection) of a loss that tells every number apart."""
    projected = projected.clone().requires_grad_()
    kind = Attention if library_for(projected, cos, heads) is None else FusedAttention
    out = kind.apply(projected, cos, sin, packing, heads, (projected.shape[-1] // heads.every) ** -0.5)
    (out.to(weight.dtype) * weight).sum().backward()
    return out.detach(), projected.grad


def attention_given(packing, heads, width, dtype):
    count = len(packing.owner)
    angles = numbers(count, width // 2, seed=4)
    projected = numbers(count, heads.every * width, seed=5, dtype=dtype)
    return projected, angles.cos(), angles.sin(), packing, heads, numbers(count, heads.queries * width, seed=6)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("heads", "width", "longest"),
    [
        (Heads(6, 2), 16, 21),
        (Heads(4, 4), 32, 24),  # a whole block of queries
        (Heads(3, 1), 64, 49),
        (Heads(2, 1), 80, 70),
        (Heads(2, 2), 6, 2),
        (Heads(2, 1), 128, 17),
        (Heads(1, 1), 256, 5),
        (Heads(2, 1), 32, 1000),
    ],
)
@pytest.mark.parametrize("packed", [rows_alike, rows_apart])
def test_attention(dtype, heads, width, longest, packed, threads):
    packing = packed(longest)
    assert packing.plain is (packed is rows_apart)
    projected, cos, sin, _, _, weight = given = attention_given(packing, heads, width, dtype)
    assert library_for(projected, cos, heads) is not None
    found = attended(*given)
    # By torch's operators: float64 is not for the kernels.
    exact = attended(projected.double(), cos.double(), sin.double(), packing, heads, weight.to(dtype).double())
    near(found[0], exact[0], dtype)
    near(found[1], exact[1], dtype)


@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_changes_no_bit_of_attention():
    given = attention_given(rows_alike(60), Heads(4, 2), 32, torch.bfloat16)
    outcomes = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        outcomes.append(attended(*given))
    assert all(torch.equal(one, other) for found in outcomes for one, other in zip(found, outcomes[0], strict=True))


@pytest.mark.parametrize("kind", [Attention, FusedAttention])
@pytest.mark.parametrize("packed", [rows_alike, rows_apart])
def test_attention_takes_a_gradient_in_any_layout(kind, packed):
    projected, cos, sin, packing, heads, weight = attention_given(packed(9), Heads(4, 2), 8, torch.float32)
    found = []
    for given in (weight, weight.t().contiguous().t()):
        mine = projected.clone().requires_grad_()
        kind.apply(mine, cos, sin, packing, heads, 0.5).backward(given)
        found.append(mine.grad)
    assert not weight.t().contiguous().t().is_contiguous()
    assert torch.equal(*found)


def test_a_row_alone_has_the_bits_that_it_has_in_company():
    packing, heads, width = rows_alike(60), Heads(4, 2), 32
    projected, cos, sin, *_, weight = given = attention_given(packing, heads, width, torch.float32)
    together = attended(*given)[0]
    for row, length in enumerate((60, 40, 59, 59, 60, 1)):
        nodes = packing.node[row, :length]
        tokens = torch.arange(length)[None]
        alone = (projected[nodes], cos[nodes], sin[nodes], pack(tokens, torch.tensor([length])), heads, weight[nodes])
        assert torch.equal(attended(*alone)[0], together[nodes])


def test_attention_of_an_unshared_row_that_is_not_finite_is_its_own():
    packing = rows_apart(30)
    projected, *rest = attention_given(packing, Heads(2, 1), 16, torch.float32)
    clean = attended(projected, *rest)
    projected[packing.node[3, 7], 0] = torch.nan  # a query
    projected[packing.node[4, 9], 2 * 16] = torch.nan  # a key
    found = attended(projected, *rest)
    for one, other in zip(found, clean, strict=True):
        assert torch.equal(one[packing.node[:3]], other[packing.node[:3]])
    assert found[0][packing.node[3, 7]].isnan().any()
    assert found[0][packing.node[4, 9:]].isnan().all()
    assert torch.equal(found[0][packing.node[4, :9]], clean[0][packing.node[4, :9]])


def test_heads_too_wide_for_the_kernels_are_left_to_torch():
    projected, cos, *_ = attention_given(rows_apart(3), Heads(1, 1), 258, torch.float32)
    assert library_for(projected, cos, Heads(1, 1)) is None


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs(dtype, entropy, temperature, threads):
    logits = numbers(9, 2500, dtype=dtype, scale=5)
    targets = torch.randint(0, 2500, (9,), generator=torch.Generator().manual_seed(1))
    weights = numbers(2, 9, seed=2)

    def outcome(logits):
        logits = logits.clone().requires_grad_()
        logprobs, entropies = chunked_logprobs(logits, targets, lambda x: x, 2500, temperature, entropy)
        loss = (weights[0].to(logprobs.dtype) * logprobs).sum()
        if entropy:
            loss = loss + (weights[1].to(logprobs.dtype) * entropies).sum()
        loss.backward()
        return logprobs.detach(), entropies.detach(), logits.grad

    found, exact = outcome(logits), outcome(logits.double())
    near(found[0], exact[0], torch.float32)
    near(found[1], exact[1], torch.float32)
    near(found[2], exact[2], dtype)


def test_words_without_mass_and_numbers_that_are_none():
    logits = numbers(4, 300)
    logits[0, 7] = -math.inf
    logits[1, 3] = math.nan
    logits[2, 5] = math.inf
    logits[3] = -math.inf
    logits.requires_grad_()
    targets = torch.tensor([8, 8, 8, 8])
    logprobs, entropies = chunked_logprobs(logits, targets, lambda x: x, 300, 1.0, True)
    assert logprobs[0].isfinite()
    assert entropies[0].isfinite()
    assert not logprobs[1:].isfinite().any()
    assert not entropies[1:].isfinite().any()
    (logprobs + entropies)[0].backward()
    assert logits.grad[0].isfinite().all()
    assert logits.grad[0, 7] == 0

    drawn, chances = sample(logits.detach(), torch.ones(4), torch.rand(4, 2, dtype=torch.float64))
    assert chances[0].isfinite()
    assert not chances[1:].isfinite().any()
    assert bool((drawn < 300).all())


def test_far_out():
    gate = torch.tensor([-3e38, -1e5, -88.5, 0.0, 88.0, 1e5])
    y = between.swiglu(torch.cat([gate, torch.ones(6)])[None])[0]
    torch.testing.assert_close(y, gate * torch.sigmoid(gate.double()).float(), rtol=1e-6, atol=1e-36)
    assert between.swiglu(torch.tensor([[-math.inf, 1.0]])).isnan().all()


def test_other_types_are_left_to_torch():
    x, gain = numbers(3, 32), numbers(32, seed=1)
    y, _ = between.rms_norm(x, gain.bfloat16(), 1e-5, torch.float32)
    near(y, between.rms_norm(x.double(), gain.bfloat16().double(), 1e-5, torch.float64)[0], torch.float32)
    with pytest.raises(AssertionError):
        chunked_logprobs(numbers(1, 300), torch.tensor([3], dtype=torch.int32), lambda x: x, 300, 1.0, False)
    frozen = FrozenLinear([Matrix(numbers(64, 32))], [], torch.float32)
    frozen.load()
    with pytest.raises((AssertionError, RuntimeError)):
        frozen(numbers(2, 30))


def test_targets_outside_the_vocabulary_are_refused():
    for target in (-1, 300):
        with pytest.raises(RuntimeError, match="outside the vocabulary of 300 words"):
            chunked_logprobs(numbers(1, 300), torch.tensor([target]), lambda x: x, 300, 1.0, False)


def test_numbers_that_are_none_stay_so_in_a_layer():
    x, gain = numbers(3, 40), torch.ones(40)
    x[1, 2] = math.nan
    y, scale = between.rms_norm(x, gain, 1e-5, torch.bfloat16)
    assert y[1].isnan().all()
    assert scale[1].isnan()
    assert y[::2].isfinite().all()
    assert between.swiglu(torch.full((1, 4), math.nan)).isnan().all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("words", [1, 2, 10, 5000])
def test_draws_are_those_of_torch(dtype, words, threads):
    rows = 40
    logits = numbers(rows, words, dtype=dtype, scale=3)
    logits[3, words // 2] = -math.inf if words > 1 else 0.0
    temperature = torch.tensor([0.0, 1.0, 0.7, 1.0, 1.3]).repeat(rows // 5)
    uniforms = torch.rand(rows, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    uniforms[:3] = 0.0
    uniforms[3:6] = 1 - 2**-53
    tokens, logprobs = sample(logits, temperature, uniforms)
    native.use(False)
    expected, exact = sample(logits.double().float(), temperature, uniforms)
    # Masses differ in their last bits, so that a uniform between two words may fall to the other: none here.
    assert torch.equal(tokens, expected)
    near(logprobs, exact, torch.float32) if words > 1 else torch.testing.assert_close(logprobs, exact)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("heads", [Heads(9, 3), Heads(2, 1), Heads(4, 4), Heads(8, 2)])
@pytest.mark.parametrize("width", [16, 64, 80])
def test_a_step_attends_to_its_slot(dtype, heads, width, threads):
    rows, capacity = 5, 30
    keys, values = numbers(7, heads.keys, capacity, width), numbers(7, heads.keys, capacity, width, seed=1)
    positions = torch.tensor([0, 29, 3, 17, 16])
    angles = numbers(rows, width // 2, seed=2)
    projected = numbers(rows, heads.every * width, seed=3, dtype=dtype)
    expected_keys, expected_values = keys.double(), values.double()
    x = projected.double().view(rows, heads.every, width)
    attention.rotate_(x[:, : heads.queries + heads.keys], angles.double().cos(), angles.double().sin())
    query, key, value = x.split([heads.queries, heads.keys, heads.keys], dim=1)
    exact = []
    for row, position in enumerate(positions.tolist()):
        expected_keys[row, :, position], expected_values[row, :, position] = key[row], value[row]
        mine = expected_keys[row, :, : position + 1].repeat_interleave(heads.queries // heads.keys, 0)
        theirs = expected_values[row, :, : position + 1].repeat_interleave(heads.queries // heads.keys, 0)
        chances = torch.softmax((mine @ query[row, :, :, None])[..., 0] * width**-0.5, dim=-1)
        exact.append((chances[:, None] @ theirs)[:, 0].flatten())
    assert slots.can_attend(keys, heads, width)
    found = slots.attend(projected, (angles.cos(), angles.sin()), keys, values, positions, heads, width**-0.5)
    near(found, torch.stack(exact), dtype)
    near(keys, expected_keys, torch.float32)
    near(values, expected_values, torch.float32)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 2), (31, 14), (32, 64), (259, 50), (64, 33)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_of_few_rows(dtype, outputs, inputs, bias, threads):
    weight = numbers(outputs, inputs, dtype=dtype)
    offsets = [numbers(outputs, seed=1, dtype=dtype)] if bias else []
    frozen = FrozenLinear([Matrix(weight)], offsets, dtype)
    frozen.load()
    library = native.on(weight)
    if library.can_multiply(native.narrow(weight)):
        halves = inputs % library.pair > 0 and dtype == torch.bfloat16  # no whole pairs: nothing is laid out
        assert (frozen.memory[0].data_ptr() == weight.data_ptr()) is halves
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 33):
        x = numbers(rows, inputs, seed=rows, dtype=dtype)
        exact = x.double() @ weight.double().t() + (offsets[0].double() if bias else 0)
        near(frozen(x), exact, dtype)


# N, O, I: fewer than a block, a panel, whole ones, several and a rest, and of each more than is taken at a time.
SHAPES = [(1, 1, 2), (7, 31, 14), (8, 32, 64), (37, 258, 50), (130, 70, 34), (9, 1100, 40)]
SHAPES += [(4200, 33, 20), (600, 40, 2500), (520, 4200, 40)]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_products_of_a_layer(dtype, rows, outputs, inputs, bias, threads):
    x, weight = numbers(rows, inputs, dtype=dtype), numbers(outputs, inputs, seed=1, dtype=dtype)
    given = numbers(rows, outputs, seed=2, dtype=dtype)
    offset = numbers(outputs, seed=3, dtype=dtype) if bias else None
    exact = x.double() @ weight.double().t() + (0 if offset is None else offset.double())
    near(products.linear(x, weight, offset), exact, dtype)
    near(products.input_gradient(given, weight), given.double() @ weight.double(), dtype)
    exact = given.double().t() @ x.double()
    if not native.on(x).can_multiply(native.narrow(x)):
        near(products.weight_gradient(given, x), exact, dtype)
        assert not products.add_weight_gradient(torch.zeros(outputs, inputs), given, x)
        return
    near(products.weight_gradient(given, x), exact, torch.float32)
    total = numbers(outputs, inputs, seed=4)
    expected = total.double() + exact
    assert products.add_weight_gradient(total, given, x)
    near(total, expected, torch.float32)


@pytest.mark.parametrize("offset", [0, 1])
def test_sums_of_many_terms_are_exact(offset):
    """2^16 of them, in float32; where their mean is not zero too."""
    one, other = (numbers(2**16, 40, seed=seed) + offset for seed in (0, 1))
    exact = one.double().t() @ other.double()
    near(products.weight_gradient(one, other), exact, torch.float32)
    near(products.linear(one.t().contiguous(), other.t().contiguous()), exact, torch.float32)
    near(products.input_gradient(one.t().contiguous(), other), exact, torch.float32)


@pytest.mark.parametrize("dtype", TYPES)
def test_products_take_rows_that_lie_apart(dtype):
    given, x = numbers(20, 90, dtype=dtype), numbers(20, 100, seed=1, dtype=dtype)
    weight = numbers(40, 100, seed=2, dtype=dtype)
    piece, part, columns = given[:, 30:70], x[:, 10:50], weight[:, 20:60]
    for found, one, other in (
        (products.linear(part, columns), part.double(), columns.double().t()),
        (products.input_gradient(piece, columns), piece.double(), columns.double()),
        (products.weight_gradient(piece, part), piece.double().t(), part.double()),
    ):
        near(found, one @ other, found.dtype)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", TYPES)
def test_neither_threads_nor_company_change_a_bit_of_a_product(dtype):
    x, weight, given = (numbers(*shape, dtype=dtype) for shape in ((200, 200), (150, 200), (200, 150)))
    library = native.on(x)
    if not library.can_multiply(native.narrow(x)):
        pytest.skip("this processor has no products of this type")
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(
            (products.linear(x, weight), products.input_gradient(given, weight), products.weight_gradient(given, x))
        )
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    for row in (0, 5, 199):
        assert torch.equal(products.linear(x[row : row + 1], weight)[0], found[0][0][row])
        assert torch.equal(products.input_gradient(given[row : row + 1], weight)[0], found[0][1][row])


@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_not_finite_stays_in_its_row(dtype):
    x, weight = numbers(20, 30, dtype=dtype), numbers(40, 30, seed=1, dtype=dtype)
    x[3, 4], x[9, 2] = torch.nan, torch.inf
    found = products.linear(x, weight)
    expected = x.double() @ weight.double().t()
    torch.testing.assert_close(found.isnan(), expected.isnan())
    assert found[3].isnan().all()
    assert found[9].isinf().all()
    assert found[[row for row in range(20) if row not in (3, 9)]].isfinite().all()


@pytest.mark.parametrize("dtype", TYPES)
def test_products_of_no_rows_or_terms(dtype):
    x, weight = numbers(0, 30, dtype=dtype), numbers(40, 30, seed=1, dtype=dtype)
    assert products.linear(x, weight).shape == (0, 40)
    assert products.input_gradient(numbers(0, 40, dtype=dtype), weight).shape == (0, 30)
    found = products.weight_gradient(numbers(0, 40, dtype=dtype), x)
    assert torch.equal(found, torch.zeros(40, 30, dtype=found.dtype))


def test_products_are_rounded_once_to_the_nearest_even():
    """Sums that float32 holds exactly, half of them ties or further from a bfloat16, and numbers that are none."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-15, 16, (60, 50), generator=generator).bfloat16() for _ in range(2))
    exact = (x.double() @ weight.double().t()).bfloat16()
    frozen = FrozenLinear([Matrix(weight)], [], torch.bfloat16)
    frozen.load()
    for found in (products.linear(x, weight), products.input_gradient(x, weight.t().contiguous()), frozen(x)):
        assert torch.equal(found, exact)
    huge = torch.tensor([[3e38], [-3e38]]).bfloat16()
    found = products.linear(huge, torch.tensor([[2.0]]).bfloat16())
    assert found[:, 0].tolist() == [math.inf, -math.inf]


def test_where_torch_crawls_in_bfloat16_its_products_are_those_of_float32(monkeypatch):
    native.use(False)
    monkeypatch.setattr(native, "multiplies_bfloat16", lambda: False)
    x, weight, offset = (numbers(*shape, dtype=torch.bfloat16) for shape in ((7, 512), (160, 512), (160,)))
    given = numbers(7, 160, seed=1, dtype=torch.bfloat16)
    frozen = FrozenLinear([Matrix(weight)], [offset], torch.bfloat16)
    frozen.load()
    products_in = types_multiplied(monkeypatch)
    for found, exact in (
        (products.linear(x, weight, offset), x.double() @ weight.double().t() + offset.double()),
        (frozen(x), x.double() @ weight.double().t() + offset.double()),
        (products.input_gradient(given, weight), given.double() @ weight.double()),
        (products.weight_gradient(given, x), given.double().t() @ x.double()),
    ):
        near(found, exact, torch.bfloat16)
    assert products_in == [torch.float32] * 4


def types_multiplied(monkeypatch):
    """Filled with the type of every product by torch."""
    found = []
    for module, name in ((torch.nn.functional, "linear"), (torch, "addmm")):
        function = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *given, function=function: found.append(given[0].dtype) or function(*given)
        )
    return found


@pytest.mark.parametrize("kernels", [False, True])
def test_where_torch_crawls_in_bfloat16_so_do_no_adapters(monkeypatch, kernels):
    native.use(kernels)
    monkeypatch.setattr(native, "multiplies_bfloat16", lambda: False)
    given = [numbers(*shape, seed=seed).bfloat16() for seed, shape in enumerate([(7, 60), (7, 40), (4, 40), (60, 4)])]

    def added(dtype):
        product, x, down, up = (each.to(dtype).requires_grad_() for each in given)
        out = Adapter(down, up, 0.5).add(product, x)
        out.backward(torch.ones_like(out) / 8)
        return [out.detach(), *(each.grad for each in (product, x, down, up))]

    exact = added(torch.float64)
    multiplied = types_multiplied(monkeypatch)
    for found, expected in zip(added(torch.bfloat16), exact, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.double() - expected).abs().max() <= 2**-6 * expected.abs().max()
    assert set(multiplied) == {torch.float32}


@pytest.mark.parametrize("dtype", TYPES)
def test_half_a_pair_of_inputs_is_left_to_torch(dtype):
    x, weight = numbers(20, 33, dtype=dtype), numbers(40, 33, seed=1, dtype=dtype)
    near(products.linear(x, weight), x.double() @ weight.double().t(), dtype)
    given = numbers(20, 41, seed=2, dtype=dtype)
    near(
        products.input_gradient(given, numbers(41, 30, seed=3, dtype=dtype)),
        given.double() @ numbers(41, 30, seed=3, dtype=dtype).double(),
        dtype,
    )
    exact = given[:19].double().t() @ x[:19].double()  # there the pairs are of rows: the last one is filled up
    found = products.weight_gradient(given[:19], x[:19])
    near(found, exact, found.dtype)


@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_changes_a_gain_alone():
    x, gain, of_y = numbers(500, 64), numbers(64, seed=1), numbers(500, 64, seed=2)
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        y, scale = between.rms_norm(x, gain, 1e-5, torch.float32)
        found.append((y, *between.rms_norm_backward(of_y, None, x, gain, scale, again=True)))
    for one, other in zip(*(each[:2] for each in found), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(found[0][3], found[1][3])
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-5, atol=1e-5)


def test_only_floats_of_a_cpu():
    assert native.on(numbers(2)) is not None
    assert native.on(numbers(2).double()) is None
    native.use(False)
    assert native.on(numbers(2)) is None


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(build.CannotBuild, match="CC is no-such-compiler, which is not there"):
        build.built()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.CannotBuild, match=r"there is no C compiler \(cc, gcc or clang\)"):
        build.built()


def test_a_compiler_that_refuses(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_FLAGS", ("-no-such-flag",))
    with pytest.raises(build.CannotBuild, match=r"ended with code 1: .*no-such-flag"):
        build.built()
    assert not list(tmp_path.rglob("*.so"))


def test_compiled_once_and_anew_for_another_processor(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_FLAGS", ("-O0", "-std=c11", "-fPIC"))
    first = build.built()
    assert first.parent == tmp_path / "mrlm"
    assert [first] == list(first.parent.iterdir())
    stamp = first.stat().st_mtime_ns
    assert build.built() == first
    assert first.stat().st_mtime_ns == stamp
    monkeypatch.setattr(build, "_processor", lambda: "another")
    assert build.built() != first


def test_a_damaged_library_is_compiled_again(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_library", None)
    whole = build.built()
    whole.write_bytes(whole.read_bytes()[:100])
    assert native.missing() is None
    assert native.state() == whole.stem
    assert whole.stat().st_size > 100


def test_a_compilers_command_may_have_words(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", f"{build.compiler()} -DWORD")
    assert build.built().is_file()
    monkeypatch.setenv("CC", "  ")
    assert build.compiler() in ("cc", "gcc", "clang")


def test_a_run_says_what_it_went_with(monkeypatch):
    recipe = tiny()
    assert settled(recipe).hardware.native is True
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setattr(native, "_reason", None)
    monkeypatch.setattr(native, "_refused", False)

    def refuse(**given):
        raise build.CannotBuild("cc ended with code 1: no")

    monkeypatch.setattr(native, "built", refuse)
    assert settled(recipe).hardware.native is False
    assert native.state() == "cannot be compiled: cc ended with code 1: no"
    with Stage(settled(recipe), (), journal=NoJournal(), check=lambda: None, phase=lambda *_: None) as stage:
        (text,) = stage.warnings()
    assert text.endswith("cc ended with code 1: no")
    wanted = recipe.model_copy(update={"hardware": recipe.hardware.model_copy(update={"native": True, "threads": 1})})
    with pytest.raises(UserError, match=r"hardware\.native is true, .* no; hardware\.native=false"):
        Stage(settled(wanted), (), journal=NoJournal(), check=lambda: None, phase=lambda *_: None)


def test_a_stage_says_where_bfloat16_crawls(monkeypatch):
    recipe = settled(tiny(hardware={"precision": "bfloat16"}))

    def said(recipe):
        with Stage(recipe, (), journal=NoJournal(), check=lambda: None, phase=lambda *_: None) as stage:
            return stage.warnings()

    monkeypatch.setattr(native, "multiplies_bfloat16", lambda: False)
    assert said(recipe) == []  # of this shape they are not torch's
    monkeypatch.setattr(Trunk, "of", lambda module: None)
    (text,) = said(recipe)
    assert "hardware.precision=float32" in text
    assert said(settled(tiny())) == []
    monkeypatch.setattr(native, "multiplies_bfloat16", lambda: True)
    assert said(recipe) == []


def test_the_engine_steps_by_the_kernel(monkeypatch):
    calls = []
    attend = slots.attend
    monkeypatch.setattr(slots, "attend", lambda *given: calls.append(0) or attend(*given))
    engine_helpers.cached(engine_helpers.tiny()).generate(engine_helpers.ragged(1.0))
    assert calls


def test_a_folder_that_others_can_write_to_is_left(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    monkeypatch.setattr(build, "_FLAGS", ("-O0", "-std=c11", "-fPIC"))
    (tmp_path / "mrlm").mkdir()
    (tmp_path / "mrlm").chmod(0o777)
    assert (tmp_path / "temporary") in build.built().parents
    for folder in (tmp_path / "temporary").iterdir():
        folder.chmod(0o770)
    with pytest.raises(build.CannotBuild, match="no folder to keep compiled kernels in"):
        build.built()


def test_a_cache_that_cannot_be_written_to(monkeypatch, tmp_path):
    (tmp_path / "mrlm").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    monkeypatch.setattr(build, "_FLAGS", ("-O0", "-std=c11", "-fPIC"))
    assert (tmp_path / "temporary") in build.built().parents

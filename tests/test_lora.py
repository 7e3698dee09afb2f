"""Low-rank adapters: their forward and gradient against peft's own, and that they start as nothing at all."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import nn

from mrlm_cli.engines.cached.llama import LlamaForward
from mrlm_cli.errors import MissingExtra, UserError
from mrlm_cli.kernels.llama import Trunk
from mrlm_cli.policy import load, lora
from mrlm_cli.policy.lora import Base
from mrlm_cli.policy.model import Policy
from mrlm_cli.recipe.sections import Lora
from tests import engine_helpers as engines
from tests.test_kernels import batch
from tests.test_policy_families import FAMILIES, norms_in_float64, tiny

PACKED = ("llama", "mistral", "qwen2", "qwen3")
SOME = ("q_proj", "v_proj", "down_proj")


def adapted(family: str, *, moved: bool = True, targets: tuple[str, ...] = (), precision: str = "float32") -> Policy:
    """A tiny policy with adapters; with `moved`, with factors that change its outputs."""
    policy = tiny(family, precision=precision)
    if family == "mistral":
        policy.lm.config.sliding_window = None  # a window is refused by the packed trunk
    policy.base = Base("somewhere", lora.fingerprint(policy.lm))
    lora.attach(policy.lm, Lora(rank=4, alpha=6, targets=targets), torch.Generator().manual_seed(0))
    if moved:
        move(policy.lm)
    return policy.eval()


def move(module: nn.Module) -> None:
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            if ".lora_B." in name:
                parameter.normal_(0, 0.1, generator=draws)


def outcome(policy: Policy) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(log-probs, the gradient of each trained parameter by a loss that tells every place apart)."""
    tokens, lengths, score = batch()
    policy.zero_grad()
    out = policy(tokens, lengths, score, temperature=0.7)
    weight = torch.arange(tokens.numel()).view(tokens.shape) / 50
    (weight * (out.logprobs + out.entropy + out.values)).sum().backward()
    named = policy.named_parameters()
    return out.logprobs.detach(), {name: each.grad for name, each in named if each.grad is not None}


@pytest.mark.parametrize("targets", [(), SOME], ids=["every", "some"])
@pytest.mark.parametrize("family", PACKED)
def test_forward_and_gradient_equal_pefts_own(
    family: str, targets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = adapted(family, targets=targets).double()
    norms_in_float64(policy.lm)
    assert Trunk.of(policy.lm.base_model) is not None
    logprobs, gradients = outcome(policy)
    plain = outcome(adapted(family, targets=targets, moved=False).double())[0]
    monkeypatch.setattr(Trunk, "of", staticmethod(lambda model: None))
    expected, theirs = outcome(policy)
    assert float((plain - expected).abs().max()) > 0.1, "the adapters must matter"
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-10)
    assert gradients.keys() == theirs.keys()
    assert {name for name in gradients if not name.startswith("value.")} == {
        name for name, parameter in policy.lm.named_parameters(prefix="lm") if ".lora_" in name
    }
    for name, gradient in theirs.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_new_adapters_change_no_bit_and_share_the_base(family: str, precision: str) -> None:
    policy = adapted(family, moved=False, precision=precision)
    reference = load.reference(policy)
    assert not lora.has_adapters(reference.lm)
    given = batch()
    with torch.no_grad():
        one = policy(*given, temperature=1.0).logprobs
        assert torch.equal(one, reference(*given, temperature=1.0).logprobs)
        plain = tiny(family, precision=precision)
        if family == "mistral":
            plain.lm.config.sliding_window = None
        assert torch.equal(one, plain(*given, temperature=1.0).logprobs)
        move(policy.lm)
        assert not torch.equal(policy(*given, temperature=1.0).logprobs, one)
        assert torch.equal(reference(*given, temperature=1.0).logprobs, one)
    own = {parameter.data_ptr() for parameter in policy.parameters()}
    assert {parameter.data_ptr() for parameter in reference.parameters()} <= own
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert {".lora_" in name for name, each in policy.lm.named_parameters() if each.requires_grad} == {True}


@pytest.mark.parametrize("family", FAMILIES)
def test_effective_weights_are_what_the_adapters_do(family: str) -> None:
    policy = adapted(family)
    merged = tiny(family)
    if family == "mistral":
        merged.lm.config.sliding_window = None
    effective = dict(lora.effective(policy.lm))
    assert effective.keys() == dict(merged.lm.named_parameters()).keys()
    with torch.no_grad():
        for name, parameter in merged.lm.named_parameters():
            parameter.copy_(effective[name])
        given = batch()
        one, other = policy(*given, temperature=1.0), merged(*given, temperature=1.0)
    torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=5e-5)


def test_what_is_drawn_depends_on_the_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one = adapted("llama", moved=False)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    other = adapted("llama", moved=False)
    down = {name: each for name, each in one.lm.named_parameters() if ".lora_A." in name}
    assert len(down) == 2 * 7
    for name, parameter in other.lm.named_parameters():
        if name in down:
            assert torch.equal(parameter, down[name])
            assert float(parameter.detach().abs().max()) <= parameter.shape[1] ** -0.5
            assert float(parameter.detach().std()) == pytest.approx(parameter.shape[1] ** -0.5 / 3**0.5, rel=0.2)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda layer: setattr(layer, "_disable_adapters", True),
        lambda layer: layer.merge(),
        lambda layer: layer.lora_dropout.update({"default": nn.Dropout(0.1)}),
        lambda layer: layer.lora_A.update({"second": nn.Linear(32, 4)}),
        lambda layer: layer.lora_B.update({"default": nn.Linear(4, 32)}),
    ],
    ids=["off", "merged", "dropout", "two", "bias"],
)
def test_adapters_of_another_kind_are_left_to_peft(spoil: Any) -> None:
    model = adapted("llama").lm
    assert LlamaForward.of(model, "float32") is not None
    spoil(model.model.layers[1].self_attn.q_proj)
    assert Trunk.of(model.base_model) is None
    assert LlamaForward.of(model, "float32") is None


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "fast"), [("llama", True), ("qwen2", True), ("gemma2", False), ("gpt2", False)])
def test_the_engine_moves_with_the_adapters(family: str, fast: bool, precision: str) -> None:
    module = engines.tiny(family).eval()
    lora.attach(module, Lora(rank=4), torch.Generator().manual_seed(0))
    assert (LlamaForward.of(module, precision) is not None) == fast
    requests = engines.ragged(1.0)
    engine = engines.cached(module, precision)
    before = [row.logprobs for row in engine.generate(requests)]
    move(module)
    engine.load(module)
    after = engine.generate(requests)
    assert [row.logprobs for row in after] != before
    plain = copy.deepcopy(lora.without_adapters(module))
    with torch.no_grad():
        for (_, value), parameter in zip(lora.effective(module), plain.parameters(), strict=True):
            parameter.copy_(value)
    tolerance = 1e-4 if precision == "float32" else 0.5
    if precision == "float32":
        engines.assert_agree(plain, requests, after, engines.cached(plain, precision).generate(requests), tolerance)
        engines.assert_agree(plain, requests, after, engines.reference(plain, precision).generate(requests), tolerance)
    else:
        merged = engines.cached(plain, precision).generate(requests)
        # Rounded otherwise, a draw near a boundary may fall to another word.
        same = [
            (one.logprobs[0], other.logprobs[0])
            for one, other in zip(after, merged, strict=True)
            if one.tokens[0] == other.tokens[0]
        ]
        assert len(same) > 0.8 * len(requests)
        assert [one for one, _ in same] == pytest.approx([other for _, other in same], abs=tolerance)


def test_unknown_targets_and_a_missing_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"no linear layer c_attn; it has down_proj, gate_proj, k_proj, o_proj"):
        adapted("llama", targets=("q_proj", "c_attn"))
    monkeypatch.setitem(sys.modules, "peft", None)  # type: ignore[arg-type]
    with pytest.raises(MissingExtra, match=r"pip install 'mrlm\[lora\]'"):
        adapted("llama")

"""The policy's forward on each model family, against the model's own full logits in float64."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.cohere import CohereConfig, CohereForCausalLM
from transformers.models.gemma import GemmaConfig, GemmaForCausalLM
from transformers.models.gemma2 import Gemma2Config, Gemma2ForCausalLM
from transformers.models.gemma3 import Gemma3ForCausalLM, Gemma3TextConfig
from transformers.models.gpt2 import GPT2Config, GPT2LMHeadModel
from transformers.models.granite import GraniteConfig, GraniteForCausalLM
from transformers.models.llama import LlamaConfig, LlamaForCausalLM
from transformers.models.mistral import MistralConfig, MistralForCausalLM
from transformers.models.qwen2 import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

from mrlm_cli.policy import load, pretrained, scratch
from mrlm_cli.policy.model import Policy
from mrlm_cli.policy.trunk import checkpoint_activations
from mrlm_cli.policy.value import Critic, ValueHead
from mrlm_cli.recipe.sections import ScratchModel

VOCABULARY = 67
WIDTH = 32
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "initializer_range": 0.3,  # large, so that different tokens have clearly different probabilities
}
LOCAL = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=5)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SHAPE)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, **LOCAL, final_logit_softcapping=3.0)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, **LOCAL)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=WIDTH,
            n_layer=2,
            n_head=4,
            n_positions=64,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
            initializer_range=0.3,
            embd_pdrop=0,
            attn_pdrop=0,
            resid_pdrop=0,
        )
    ),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.25)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=4.0)),
}
TEMPERATURE = 0.7


def tiny(family, *, init="normal", head="linear", trunk_gradient=1.0, precision="float32"):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        lm = pretrained.settled(FAMILIES[family]())
    value = ValueHead(WIDTH, head, init, torch.Generator().manual_seed(3))
    return Policy(lm, value, precision=precision, trunk_gradient=trunk_gradient)


def episodes():
    """Four right-padded rows; scored tokens scattered, never at index 0."""
    draws = torch.Generator().manual_seed(11)
    lengths = torch.tensor([12, 5, 9, 2])
    tokens = torch.randint(2, VOCABULARY, (4, 12), generator=draws)
    score = torch.rand(4, 12, generator=draws) < 0.6
    score[:, 0] = False
    score[:, 1] = True
    inside = torch.arange(12)[None] < lengths[:, None]
    return torch.where(inside, tokens, 0), lengths, score & inside


def loss_of(out, weights):
    """A sum over scored tokens that every output enters."""
    return (weights * (out.logprobs + 0.1 * out.entropy + (out.values - 1) ** 2)).sum() + out.final_values.sum()


def gradients(policy, loss):
    policy.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def distance(some, others):
    """Relative L2 distance of two gradients over all parameters together."""
    assert some.keys() == others.keys()
    difference = sum(((some[name] - others[name]).double() ** 2).sum() for name in some)
    return float((difference / sum((g.double() ** 2).sum() for g in others.values())).sqrt())


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_equals_the_full_logits_of_the_plain_model(family):
    policy = tiny(family)
    tokens, lengths, score = episodes()
    out = policy(tokens, lengths, score, temperature=TEMPERATURE)
    plain = copy.deepcopy(policy).double()
    for row in range(len(tokens)):
        real = tokens[None, row, : lengths[row]]  # no padding here at all
        with torch.no_grad():
            answer = plain.lm(input_ids=real, output_hidden_states=True)
            log_p = torch.log_softmax(answer.logits[0].double() / TEMPERATURE, dim=-1)
            values = plain.value.last(answer.hidden_states[-1][0])[:, 0]
        for t in range(tokens.shape[1]):
            if score[row, t]:
                assert out.logprobs[row, t].item() == pytest.approx(log_p[t - 1, tokens[row, t]].item(), abs=2e-5)
                entropy = -(log_p[t - 1].exp() * log_p[t - 1]).sum().item()
                assert out.entropy[row, t].item() == pytest.approx(entropy, abs=2e-5)
                assert out.values[row, t].item() == pytest.approx(values[t - 1].item(), abs=2e-5)
            else:
                assert out.logprobs[row, t] == out.entropy[row, t] == out.values[row, t] == 0
        assert out.final_values[row].item() == pytest.approx(values[lengths[row] - 1].item(), abs=2e-5)
    assert out.logprobs.dtype == out.entropy.dtype == out.values.dtype == out.final_values.dtype == torch.float32
    assert out.logprobs[score].std() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_order_change_nothing(family):
    policy = tiny(family)
    tokens, lengths, score = episodes()
    with torch.no_grad():
        out = policy(tokens, lengths, score, temperature=TEMPERATURE)
        garbage = torch.randint(2, VOCABULARY, (4, 7), generator=torch.Generator().manual_seed(5))
        longer = torch.cat([tokens, garbage], dim=1)
        longer[:, :12] = torch.where(torch.arange(12)[None] < lengths[:, None], tokens, garbage[:, :1])
        padded = policy(longer, lengths, torch.cat([score, score[:, :7] & False], 1), temperature=TEMPERATURE)
        order = torch.tensor([2, 0, 3, 1])
        permuted = policy(tokens[order], lengths[order], score[order], temperature=TEMPERATURE)
    for name in ("logprobs", "entropy", "values"):
        torch.testing.assert_close(getattr(padded, name)[:, :12], getattr(out, name), rtol=0, atol=5e-6)
        torch.testing.assert_close(getattr(permuted, name), getattr(out, name)[order], rtol=0, atol=5e-6)
        assert not getattr(padded, name)[:, 12:].any()
    torch.testing.assert_close(padded.final_values, out.final_values, rtol=0, atol=5e-6)
    torch.testing.assert_close(permuted.final_values, out.final_values[order], rtol=0, atol=5e-6)


def norms_in_float64(lm):
    """transformers' norms round to fp32 inside, whatever they are given: compute them in the type of their input."""
    for module in lm.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
            offset = 1 if kind.startswith("Gemma") else 0
            module.forward = lambda x, m=module, e=eps, o=offset: (
                (m.weight + o) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + e)
            )
        elif kind == "CohereLayerNorm":
            module.forward = lambda x, m=module: m.weight * torch.layer_norm(x, x.shape[-1:], eps=m.variance_epsilon)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_gradient_does_not_depend_on_micro_batches(family, dtype, limit):
    policy = tiny(family, head="mlp").to(dtype)
    if dtype == torch.float64:
        norms_in_float64(policy.lm)
        if family == "gemma2":
            limit = 1e-7  # its soft-capped attention has an fp32 softmax that no setting lifts
    tokens, lengths, score = episodes()
    weights = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(2)).to(dtype) * score

    def loss(rows):
        longest = int(lengths[rows].max())
        cut = slice(None, longest)
        out = policy(tokens[rows, cut], lengths[rows], score[rows, cut], temperature=TEMPERATURE)
        return loss_of(out, weights[rows, cut])

    whole = gradients(policy, loss(torch.arange(4)))
    for parts in ([[0], [1], [2], [3]], [[3, 1], [0, 2]]):
        pieces = gradients(policy, sum(loss(torch.tensor(rows)) for rows in parts))
        assert distance(pieces, whole) <= limit
    assert len(whole) == len(list(policy.parameters()))


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_layers_run_twice_and_give_the_same_gradient(family):
    tokens, lengths, score = episodes()
    plain, saving = tiny(family), tiny(family)
    checkpoint_activations(saving.lm)
    results, calls = [], []
    for policy in (plain, saving):
        count = []
        layers = next(m for name, m in policy.lm.base_model.named_children() if name in ("layers", "h"))
        # The start of the MLP: inside a layer, and the recomputation stops as soon as it has what it needs.
        handle = layers[0].mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        out = policy(tokens, lengths, score, temperature=TEMPERATURE)
        results.append(gradients(policy, loss_of(out, score.float())))
        handle.remove()
        calls.append(len(count))
        assert not any(module.training for module in policy.lm.modules())
    assert calls == [1, 2]
    assert distance(results[1], results[0]) <= 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_near_float32_and_keeps_the_residual_stream_in_float32(family):
    tokens, lengths, score = episodes()
    exact, rough = tiny(family), tiny(family, precision="bfloat16")
    seen = {}

    def watch(name):
        return lambda _module, _inputs, output: seen.__setitem__(
            name, output[0] if isinstance(output, tuple) else output
        )

    for name, module in rough.lm.named_modules():
        if name.endswith(("q_proj", "c_attn", "embed_tokens", "wte")) or "rotary" in name or name.endswith(".norm"):
            module.register_forward_hook(watch(name))
    with torch.no_grad():
        expected = exact(tokens, lengths, score, temperature=TEMPERATURE)
        got = rough(tokens, lengths, score, temperature=TEMPERATURE)
    for name, output in seen.items():
        assert output.dtype == (torch.bfloat16 if name.endswith(("q_proj", "c_attn")) else torch.float32), name
    assert any(name.endswith(("q_proj", "c_attn")) for name in seen)
    gap = (got.logprobs - expected.logprobs).abs()
    assert 0 < gap.max() < 0.3
    assert gap[score].mean() < 0.06
    assert got.logprobs.dtype == got.values.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_policy_is_a_plain_transformers_model(family, tmp_path):
    policy = tiny(family)
    tokenizer = scratch.tokenizer(ScratchModel(type="scratch", context=64))
    load.save(policy, tokenizer, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy", "value.safetensors"]
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    tokens, _, _ = episodes()
    with torch.no_grad():
        assert torch.equal(lm(input_ids=tokens).logits, policy.lm(input_ids=tokens).logits)
    assert all(parameter.dtype == torch.float32 for parameter in lm.parameters())
    inputs = AutoTokenizer.from_pretrained(tmp_path / "policy")("Sort 31 É!", return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    written = lm.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert written.shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_load_weights_brings_every_bit_back_into_new_allocations(family, tmp_path):
    policy = tiny(family, head="mlp")
    tokenizer = scratch.tokenizer(ScratchModel(type="scratch", context=64))
    load.save(policy, tokenizer, tmp_path)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    objects = dict(policy.named_parameters())
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(1)
    addresses = {name: p.data_ptr() for name, p in policy.named_parameters()}
    load.load_weights(policy, tmp_path)
    for name, p in policy.named_parameters():
        assert p is objects[name]
        assert torch.equal(p, before[name]), name
        assert p.data_ptr() != addresses[name]
        assert p.is_contiguous()
        assert p.untyped_storage().nbytes() == p.numel() * 4
    if policy.lm.config.tie_word_embeddings:
        assert policy.lm.get_output_embeddings().weight is policy.lm.get_input_embeddings().weight


def test_bfloat16_gradients_are_near_and_survive_checkpointing():
    tokens, lengths, score = episodes()
    exact, rough, saving = tiny("qwen3"), tiny("qwen3", precision="bfloat16"), tiny("qwen3", precision="bfloat16")
    checkpoint_activations(saving.lm)
    found = [
        gradients(policy, loss_of(policy(tokens, lengths, score, temperature=1.0), score.float()))
        for policy in (exact, rough, saving)
    ]
    assert 1e-4 < distance(found[1], found[0]) < 0.05
    assert distance(found[2], found[1]) < 1e-6
    assert all(gradient.dtype == torch.float32 for gradient in found[1].values())


def test_trunk_gradient_scales_only_what_the_value_loss_sends_into_the_trunk():
    tokens, lengths, score = episodes()

    def value_gradient(factor):
        policy = tiny("llama", trunk_gradient=factor)
        out = policy(tokens, lengths, score, temperature=1.0)
        return gradients(policy, ((out.values - 1) ** 2).sum() + out.final_values.sum()), out

    full, full_out = value_gradient(1.0)
    tenth, tenth_out = value_gradient(0.1)
    none, none_out = value_gradient(0.0)
    assert torch.equal(full_out.values, tenth_out.values)
    assert torch.equal(full_out.values, none_out.values)
    for name, gradient in full.items():
        if name.startswith("value."):
            assert torch.equal(gradient, tenth[name])
            assert torch.equal(gradient, none[name])
        else:
            assert gradient.abs().max() > 0
            assert name not in none
    trunk = [name for name in full if name.startswith("lm.")]
    assert distance({n: tenth[n] for n in trunk}, {n: 0.1 * full[n] for n in trunk}) < 1e-5


@pytest.mark.parametrize("separate", [False, True])
def test_value_only_sends_nothing_into_the_policy(separate):
    policy = tiny("llama")
    if separate:
        policy = Policy(policy.lm, Critic(copy.deepcopy(policy.lm.base_model), policy.value))
    tokens, lengths, score = episodes()
    out = policy(tokens, lengths, score, temperature=1.0, value_only=True)
    assert not out.logprobs.requires_grad
    assert out.logprobs[score].abs().min() > 0
    found = gradients(policy, (out.values**2).sum())
    assert found
    assert all(name.startswith("value.") for name in found)
    assert any(name.startswith("value.trunk") for name in found) is separate


def test_a_separate_critic_is_trained_apart_from_the_policy():
    policy = tiny("qwen2")
    policy = Policy(policy.lm, Critic(copy.deepcopy(policy.lm.base_model), policy.value))
    tokens, lengths, score = episodes()
    out = policy(tokens, lengths, score, temperature=1.0)
    assert all(n.startswith("value.") for n in gradients(policy, out.values.sum() + out.final_values.sum()))
    out = policy(tokens, lengths, score, temperature=1.0)
    assert all(n.startswith("lm.") for n in gradients(policy, out.logprobs.sum()))
    shared = Policy(policy.lm, policy.value.head)(tokens, lengths, score, temperature=1.0)
    assert torch.equal(out.values, shared.values)  # still a copy of the policy's trunk


def test_what_is_not_asked_for_is_not_computed():
    policy = tiny("llama")
    tokens, lengths, score = episodes()
    heads = []
    policy.lm.lm_head.register_forward_hook(lambda _m, inputs, _o: heads.append(len(inputs[0])))
    out = policy(tokens, lengths, score, temperature=1.0, logprobs=False)
    assert heads == []
    assert not out.logprobs.any()
    assert out.values[score].abs().min() > 0
    out = policy(tokens, lengths, score, temperature=1.0, values=False, entropy=False)
    assert heads == [int(score.sum())]  # the head runs on scored tokens and no others
    assert out.values is None
    assert out.final_values is None
    assert not out.entropy.any()
    nothing = policy(tokens, lengths, score & False, temperature=1.0)
    assert not nothing.logprobs.any()
    assert nothing.final_values.abs().min() > 0
    score[2, 0] = True
    with pytest.raises(ValueError, match="never chosen"):
        policy(tokens, lengths, score, temperature=1.0)


def test_the_end_token_learns_even_where_it_pads():
    """transformers drops the embedding gradient of the padding token; pad may equal the end token in a chat."""
    policy = tiny("qwen3")
    assert policy.lm.config.pad_token_id == 0
    tokens = torch.tensor([[5, 0, 7, 8]])
    score = torch.tensor([[False, False, True, True]])
    out = policy(tokens, torch.tensor([4]), score, temperature=1.0)
    found = gradients(policy, out.logprobs.sum())["lm.model.embed_tokens.weight"]
    assert found[0].abs().max() > 0
    assert found[9].abs().max() == 0


def test_value_file_holds_the_head_and_nothing_else(tmp_path):
    policy = tiny("llama", head="mlp")
    load.save(policy, scratch.tokenizer(ScratchModel(type="scratch", context=64)), tmp_path)
    stored = load_file(tmp_path / "value.safetensors")
    assert sorted(stored) == ["hidden.bias", "hidden.weight", "last.bias", "last.weight"]

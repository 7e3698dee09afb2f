"""The cached engine against transformers' own generate, for every family of models."""

import pytest
import torch

from mrlm_cli.draws import uniforms
from mrlm_cli.engines.sampler import sample
from mrlm_cli.errors import EngineError
from mrlm_cli.records import Request
from tests.engine_helpers import (
    FAMILIES,
    assert_agree,
    cached,
    is_near_tie,
    nothing,
    prompt,
    ragged,
    reference,
    request,
    tiny,
    true_logits,
)

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_equals_generate(family):
    module = tiny(family)
    for temperature in (0.0, 1.0):
        requests = ragged(temperature)
        slow = reference(module).generate(requests)
        assert len({len(done.tokens) for done in slow}) > 1 or temperature == 0  # rows end at different times
        for slots in (64, 3):  # all at once; refilled
            assert_agree(module, requests, cached(module, slots=slots).generate(requests), slow)
    assert module.training
    assert all(part.training for part in module.modules())


def test_tokens_and_logprobs_are_those_of_plain_forwards():
    module = tiny()
    requests = [request("a", prompt("a", 5), temperature=0.7), request("b", prompt("b", 11), temperature=0.0)]
    for make in (cached, reference):
        for asked, done in zip(requests, make(module).generate(requests), strict=True):
            temperature = asked.limits.temperature
            for count, (token, logprob) in enumerate(zip(done.tokens, done.logprobs, strict=True)):
                logits = true_logits(module, asked.tokens + done.tokens[:count])
                drawn = uniforms(asked.draw_key, len(asked.tokens) + count)  # the absolute position in the conversation
                row = torch.tensor([drawn], dtype=torch.float64)
                expected = int(sample(logits[None], torch.tensor([temperature]), row)[0])
                assert token == expected or is_near_tie(module, asked, done.tokens[:count], token, expected)
                assert abs(float(torch.log_softmax(logits / (temperature or 1.0), dim=-1)[token]) - logprob) < 1e-4


def test_sampled_tokens_do_not_depend_on_the_company():
    module = tiny()
    requests = ragged(1.0)
    together = cached(module).generate(requests)
    backwards = cached(module, slots=4).generate(requests[::-1])[::-1]
    assert_agree(module, requests, backwards, together)
    alone = [cached(module).generate([asked])[0] for asked in requests]
    assert_agree(module, requests, alone, together)
    assert len({done.tokens for done in together[-4:]}) > 1  # one prompt, different draw keys


def test_draw_key_alone_decides():
    module = tiny()
    same = [Request(name, prompt("x", 6), b"k" * 16, request("", (3,)).limits) for name in ("a", "b")]
    first, second = cached(module).generate(same)
    assert first == second


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_bits_repeat(precision):
    module = tiny()
    requests = ragged(1.0)
    engine = cached(module, precision, slots=4)
    first = engine.generate(requests)
    engine.load(module)
    assert engine.generate(requests) == first  # the same engine, after a load
    engine.free([asked.conversation for asked in requests])
    engine.generate([request("other", prompt("other", 30), new=20)])
    engine.free(["other"])
    assert engine.generate(requests) == first  # nothing is left of a larger call
    assert cached(tiny(), precision, slots=4).generate(requests) == first  # equal weights elsewhere


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_bfloat16_is_close_and_follows_load(family):
    module = tiny(family)
    module.requires_grad_(True)
    requests = ragged(1.0)
    ours, slow = cached(module, "bfloat16"), reference(module, "bfloat16")
    exact = cached(module).generate(requests)
    for engine in (ours, slow):
        gaps = []
        for done, true in zip(engine.generate(requests), exact, strict=True):
            for mine, other, a, b in zip(done.tokens, true.tokens, done.logprobs, true.logprobs, strict=False):
                if mine != other:
                    break
                gaps.append(abs(a - b))
        assert 0 < sum(gaps) / len(gaps) < 0.1
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.5)
    ours.load(module)
    assert ours.generate(requests) == cached(module, "bfloat16").generate(requests)
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in module.parameters())


def test_float32_shares_the_weights_and_training_goes_on():
    module = tiny()
    engine = cached(module)
    before = engine.generate([request("a", prompt("a", 5), temperature=0.0)])
    loss = module(input_ids=torch.tensor([prompt("a", 5)]), labels=torch.tensor([prompt("a", 5)])).loss
    loss.backward()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.sub_(parameter.grad)
    engine.load(module)
    after = engine.generate([request("a", prompt("a", 5), temperature=0.0)])
    assert after[0].logprobs != before[0].logprobs
    assert_agree(
        module,
        [request("a", prompt("a", 5), temperature=0.0)],
        after,
        reference(module).generate([request("a", prompt("a", 5), temperature=0.0)]),
    )


def test_rows_that_end_early_are_carried_along_unharmed():
    module = tiny()
    # One row in ten ends at once, too few for a turnover, while the others go on for longer than its slot has room.
    early = request("early", prompt("early", 30), new=2)
    requests = [early, *(request(f"r{i}", prompt(f"r{i}", 2), new=30) for i in range(9))]
    engine = cached(module)
    done = engine.generate(requests)
    assert_agree(module, requests, done, reference(module).generate(requests))
    further = [request("early", early.tokens + done[0].tokens + (9,), new=6)]
    assert_agree(module, further, engine.generate(further), reference(module).generate(further))


def test_equal_prompts_are_computed_once():
    module = tiny()
    fed = []
    handle = module.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0].numel()))
    requests = [request(f"s{i}", prompt("s", 9), new=1) for i in range(6)] + [request("t", prompt("t", 4), new=1)]
    cached(module).generate(requests)
    assert fed == [9 + 4]
    fed.clear()
    cached(module, slots=2).generate(requests)  # later joiners copy the prompt and feed its last token
    handle.remove()
    assert sum(fed) < 9 + 4 * 2 * 2 + 4 * 2


def test_kept_cache_stays_within_its_budget():
    module = tiny()
    requests = ragged(1.0)
    small = cached(module, max_cached_tokens=64)  # capacity is 32 a row: two rows at a time
    assert_agree(module, requests, small.generate(requests), cached(module).generate(requests))
    pools = [pool for pools in small._decoder._cache._pools for pool in pools]
    assert {tuple(pool.shape) for pool in pools} == {(2, 2, 32, 16)}


def test_head_runs_only_where_a_token_is_chosen():
    module = tiny()
    seen = []
    handle = module.get_output_embeddings().register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    cached(module).generate(ragged(1.0))
    handle.remove()
    assert set(seen) == {1}
    assert not module.get_output_embeddings()._forward_pre_hooks


def test_check_is_called_each_step_and_may_stop():
    module = tiny()
    calls = []
    for make in (cached, reference):
        calls.clear()
        make(module, check=lambda: calls.append(1)).generate([request("a", prompt("a", 5), new=7)])
        assert len(calls) == 7

    def interrupt():
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)

    calls.clear()
    engine = cached(module, check=interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(ragged(1.0))
    calls.append(1)
    assert_agree(module, ragged(1.0), engine.generate(ragged(1.0)), cached(module, check=nothing).generate(ragged(1.0)))
    assert module.training


@pytest.mark.parametrize("make", [cached, reference])
def test_logits_that_are_not_finite_are_an_error(make):
    module = tiny()
    with torch.no_grad():
        module.get_input_embeddings().weight[40] = torch.nan
    good = request("fine", (3, 4, 5), temperature=0.0, new=1)
    with pytest.raises(EngineError, match=r"'broken'.*position 3 .*not finite"):
        make(module).generate([request("broken", (3, 40, 5), new=2)])
    with torch.no_grad():
        module.get_input_embeddings().weight[40] = 0.1
    assert len(make(module).generate([good])) == 1


def test_families_that_keep_more_than_keys_and_values_are_refused():
    module = tiny()
    module.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(EngineError, match=r"linear_attention.*generate"):
        cached(module)

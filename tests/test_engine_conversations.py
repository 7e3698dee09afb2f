"""How completions end, and conversations of several turns over a kept cache."""

import pytest

from mrlm_cli.errors import EngineError
from tests.engine_helpers import (
    FAMILIES,
    assert_agree,
    cached,
    decode,
    own_memory,
    prompt,
    ragged,
    reference,
    request,
    tiny,
)

pytestmark = pytest.mark.usefixtures("kernels")

ENGINES = [pytest.param(cached, id="cached"), pytest.param(reference, id="generate")]


def greedy(make, module, **limits):
    return make(module).generate([request("c", prompt("c", 6), temperature=0.0, **limits)])[0]


@pytest.mark.parametrize("make", ENGINES)
def test_ends(make):
    module = tiny()
    free = greedy(make, module, new=12)
    assert (len(free.tokens), free.stop) == (12, "length")
    end = free.tokens[4]
    first = free.tokens.index(end)

    stopped = greedy(make, module, new=12, ends=(end,))
    assert (stopped.tokens, stopped.stop) == (free.tokens[: first + 1], "end")
    assert stopped.logprobs == pytest.approx(free.logprobs[: first + 1], abs=1e-5)

    assert greedy(make, module, new=12, ends=(end,), ignore_end=True) == free
    assert greedy(make, module, new=first + 1, ends=(end,)).stop == "end"  # on the last allowed token
    one = greedy(make, module, new=1)
    assert (one.tokens, one.stop) == (free.tokens[:1], "length")


@pytest.mark.parametrize("make", ENGINES)
def test_stop_strings_may_span_tokens(make):
    module = tiny()
    free = greedy(make, module, new=12)
    text = decode(free.tokens)
    wanted = text[3:6]
    end = text.index(wanted) + 3
    stopped = greedy(make, module, new=12, stop_strings=("not there", wanted))
    assert (stopped.tokens, stopped.stop) == (free.tokens[:end], "string")
    assert greedy(make, module, new=12, stop_strings=("not there",)) == free
    beyond = decode(prompt("c", 6))[-1] + text[0]  # half of it lies in the prompt
    assert beyond not in text
    assert greedy(make, module, new=12, stop_strings=(beyond,)) == free


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_turns_over_a_kept_cache_equal_fresh_runs(family):
    module = tiny(family)
    engine = cached(module, slots=3)
    names = [f"c{i}" for i in range(5)]
    tokens = {name: prompt(name, 3 + 2 * i) for i, name in enumerate(names)}
    for turn in range(3):
        temperature = 0.0 if turn == 1 else 1.0
        asked = [request(name, tokens[name], 4 + i, temperature, ends=(5, 6, 7, 8)) for i, name in enumerate(names)]
        if turn == 2:
            asked = [*asked[::-1][:3], request("late", prompt("late", 12), 5, temperature)]
        ours = engine.generate(asked)
        assert_agree(module, asked, ours, cached(module).generate(asked))
        for row, done in zip(asked, ours, strict=True):
            tokens[row.conversation] = row.tokens + done.tokens + prompt(f"{row.conversation} {turn}", 1 + turn)


def test_a_turn_feeds_only_what_is_new():
    module = tiny()
    engine = cached(module)
    first = request("c", prompt("c", 20), new=4)
    done = engine.generate([first])[0]
    fed = []
    handle = module.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0].numel()))
    engine.generate([request("c", first.tokens + done.tokens + (9, 9, 9), new=3)])
    handle.remove()
    assert fed == [4, 1, 1]  # the last sampled token and three new ones, then one a step


def test_turns_survive_a_budget_that_drops_caches():
    module = tiny()
    small, large = cached(module, max_cached_tokens=70), cached(module)
    tokens = {f"c{i}": prompt(f"c{i}", 5 + i) for i in range(5)}
    for turn in range(3):
        asked = [request(name, row, 6) for name, row in tokens.items()]
        ours = small.generate(asked)
        assert_agree(module, asked, ours, large.generate(asked))
        tokens = {
            name: row + done.tokens + prompt(f"{name} {turn}", 2)
            for (name, row), done in zip(tokens.items(), ours, strict=True)
        }


@pytest.mark.parametrize("make", ENGINES)
def test_conversations_are_append_only(make):
    module = tiny()
    engine = make(module)
    first = request("c", prompt("c", 6), new=3)
    done = engine.generate([first])[0]
    whole = first.tokens + done.tokens
    changed = (whole[0] % 60 + 3, *whole[1:])
    sampled_away = (*whole[:-1], whole[-1] % 60 + 3)
    for tokens in (changed, sampled_away, whole[:-1], first.tokens):
        with pytest.raises(EngineError, match=r"'c' is append-only.*9 it holds"):
            engine.generate([request("c", (*tokens,), new=2)])
    engine.generate([request("c", (*whole, 9), new=2)])
    engine.free(["c", "never seen"])
    engine.generate([request("c", changed, new=2)])  # forgotten: anything goes
    engine.load(module)
    engine.generate([request("c", (4, 5), new=2)])


@pytest.mark.parametrize("make", ENGINES)
@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ([request("a", ()), request("b", (3,))], "'a' has no tokens"),
        ([request("a", (3,)), request("a", (3, 4))], "'a' is asked for twice"),
        ([request("a", (3,), new=0)], "max_new_tokens is 0"),
        ([request("a", (3,), temperature=-1.0)], "temperature is -1.0"),
        ([request("a", (3,) * 60, new=6)], "do not fit the model's context of 64"),
    ],
)
def test_bad_requests(make, bad, text):
    with pytest.raises(EngineError, match=text):
        make(tiny()).generate(bad)


@pytest.mark.parametrize("make", ENGINES)
def test_the_whole_context_can_be_used(make):
    module = tiny("gpt2")  # learnt positions: one too many would be an index error
    done = make(module).generate([request("a", prompt("a", 60), new=5), request("b", prompt("b", 2), new=5)])
    assert [len(row.tokens) for row in done] == [5, 5]


def test_no_weights_and_no_requests():
    from mrlm_cli.engines.cached.engine import CachedEngine
    from mrlm_cli.engines.generate import GenerateEngine

    for cls in (CachedEngine, GenerateEngine):
        engine = cls(cls.Config(), decode=decode, precision="float32", check=lambda: None)
        with pytest.raises(EngineError, match="load a policy"):
            engine.generate([request("a", (3,))])
        engine.load(tiny())
        assert engine.generate([]) == []


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("make", [cached, reference])
def test_a_released_engine_needs_weights_and_then_is_as_before(make, family, precision):
    module = tiny(family)
    engine, asked = make(module, precision), ragged(1.0)
    done = engine.generate(asked)
    engine.release()
    with pytest.raises(EngineError, match="load a policy"):
        engine.generate(asked)
    engine.load(module)
    assert engine.generate(asked) == done


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("make", ENGINES)
def test_a_released_engine_holds_no_memory_of_its_own(make, family, precision):
    module = tiny(family)
    engine = make(module, precision)
    engine.generate(ragged(1.0))
    assert (own_memory(engine, module) > 0) == (make is cached or precision == "bfloat16")
    engine.release()
    assert own_memory(engine, module) == 0


def test_freed_rows_leave_the_others_whole():
    module = tiny()
    engine = cached(module, slots=4)
    asked = ragged(1.0)
    done = dict(zip([row.conversation for row in asked], engine.generate(asked), strict=True))
    engine.free([row.conversation for row in asked[::2]])
    further = [
        request(row.conversation, row.tokens + done[row.conversation].tokens + (9,), 5) for row in asked[1::2]
    ] + [request("new", prompt("new", 8), 5)]
    assert_agree(module, further, engine.generate(further), cached(module).generate(further))

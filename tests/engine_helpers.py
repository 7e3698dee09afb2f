"""Small random models of every family, and what it means that two engines agree."""

import gc
import itertools
import random
import types

import torch
import transformers

from mrlm_cli.draws import draw_key, uniforms
from mrlm_cli.engines.cached.engine import CachedEngine
from mrlm_cli.engines.generate import GenerateEngine
from mrlm_cli.engines.sampler import sample
from mrlm_cli.records import Completion, Limits, Request

WORDS = 71
SHAPE = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # as many as the kernel of a decoding step takes at once
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # large, so that positions and masks matter to the logits
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ALTERNATING = ["sliding_attention", "sliding_attention", "full_attention"]
FAMILIES = {
    "llama": (transformers.LlamaForCausalLM, lambda: transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "qwen2": (transformers.Qwen2ForCausalLM, lambda: transformers.Qwen2Config(**SHAPE)),
    "qwen3": (transformers.Qwen3ForCausalLM, lambda: transformers.Qwen3Config(**SHAPE)),
    "mistral": (transformers.MistralForCausalLM, lambda: transformers.MistralConfig(**SHAPE, sliding_window=6)),
    "gemma": (transformers.GemmaForCausalLM, lambda: transformers.GemmaConfig(**SHAPE)),
    "gemma2": (transformers.Gemma2ForCausalLM, lambda: transformers.Gemma2Config(**SHAPE, sliding_window=6)),
    "gemma3": (
        transformers.Gemma3ForCausalLM,
        lambda: transformers.Gemma3TextConfig(**SHAPE, sliding_window=6, layer_types=ALTERNATING),
    ),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        lambda: transformers.GPT2Config(
            vocab_size=WORDS,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=64,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
}


def tiny(family="llama", seed=0):
    torch.manual_seed(seed)
    make, config = FAMILIES[family]
    return make(config()).train()  # in training mode, as a trainer hands it over


def decode(tokens):
    """Token 10 is "a", 11 is "b", …: a character for each token."""
    return "".join(chr(87 + token) for token in tokens)


def nothing():
    """A check that finds nothing."""


def cached(module, precision="float32", check=nothing, **settings):
    engine = CachedEngine(CachedEngine.Config(**settings), decode=decode, precision=precision, check=check)
    engine.load(module)
    return engine


def reference(module, precision="float32", check=nothing):
    engine = GenerateEngine(GenerateEngine.Config(), decode=decode, precision=precision, check=check)
    engine.load(module)
    return engine


def own_memory(engine, module):
    """Bytes of tensors that an engine holds besides those of the module that it was loaded with."""
    not_held = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)
    seen, waiting, found = {id(module)}, [vars(engine)], {}
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, not_held):
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor):
            found[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
        else:
            waiting.extend(gc.get_referents(each))
    theirs = {each.untyped_storage().data_ptr() for each in (*module.parameters(), *module.buffers())}
    return sum(size for place, size in found.items() if place not in theirs)


def prompt(name, length):
    draw = random.Random(name)
    return tuple(draw.randrange(3, WORDS) for _ in range(length))


def request(name, tokens, new=8, temperature=1.0, ends=(), **limits):
    return Request(name, tuple(tokens), draw_key(name), Limits(new, temperature, tuple(ends), **limits))


def ragged(temperature, new=9):
    """Eleven requests: lengths 1 to 17, the last four share a prompt."""
    lengths = (1, 17, 4, 9, 2, 13, 6)
    rows = [request(f"r{i}", prompt(f"p{i}", n), new, temperature, ends=(5, 6, 7)) for i, n in enumerate(lengths)]
    return rows + [request(f"s{i}", prompt("p3", 9), new, temperature, ends=(5, 6, 7)) for i in range(4)]


@torch.no_grad()
def true_logits(module, tokens):
    """Logits after `tokens` by one plain forward of the whole sequence."""
    mode = module.training
    try:
        return module.eval()(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].float()
    finally:
        module.train(mode)


def is_near_tie(module, asked, before, first, second):
    """Whether rounding may decide between two tokens: top-two logits, or a uniform at a boundary, within 1e-4."""
    logits = true_logits(module, asked.tokens + before)
    temperature = asked.limits.temperature
    if temperature == 0:
        top = logits.topk(2).values
        return float(top[0] - top[1]) < 1e-4
    block, word = uniforms(asked.draw_key, len(asked.tokens) + len(before))
    nudged = [(block + x, word + y) for x, y in itertools.product((-1e-4, 0.0, 1e-4), repeat=2)]
    drawn = torch.tensor(nudged, dtype=torch.float64).clamp(0, 1 - 2**-53)
    picks, _ = sample(logits.expand(len(nudged), -1), torch.full((len(nudged),), temperature), drawn)
    return {first, second} <= set(picks.tolist())


def assert_agree(module, requests, ours: list[Completion], theirs: list[Completion], tolerance=1e-4):
    """Equal tokens, stops and log-probs up to the first near tie of each row; at most one row in four has one."""
    ties = 0
    for asked, mine, other in zip(requests, ours, theirs, strict=True):
        same = list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(mine.tokens, other.tokens, strict=False)))
        count = len(same)
        gaps = [abs(a - b) for a, b in zip(mine.logprobs[:count], other.logprobs[:count], strict=True)]
        assert max(gaps, default=0.0) < tolerance, asked.conversation
        if mine.tokens == other.tokens:
            assert mine.stop == other.stop, asked.conversation
        else:
            assert count < min(len(mine.tokens), len(other.tokens)), asked.conversation
            assert is_near_tie(module, asked, mine.tokens[:count], mine.tokens[count], other.tokens[count])
            ties += 1
    assert ties * 4 <= len(requests)

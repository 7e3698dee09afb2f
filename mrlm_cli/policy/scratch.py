"""Models made on the spot: a small Llama with random weights and a tokenizer of characters or bytes."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mrlm_cli.draws import integer
from mrlm_cli.recipe.sections import ScratchModel

PAD, END, UNKNOWN = "<pad>", "<end>", "<unk>"
SPECIAL = (PAD, END, UNKNOWN)  # ids 0, 1, 2
INIT_STD = 0.02  # Radford et al. 2019


def generator(seed: int, what: str) -> torch.Generator:
    """A generator whose stream depends on (seed, what) alone."""
    return torch.Generator().manual_seed(integer(2**63, seed, "weights", what))


def tokenizer(section: ScratchModel) -> Any:
    """One token for each character of the alphabet, or for each byte, after the three special ones.

    decode(encode(text)) == text for text of the alphabet (any text for bytes): no space is added or cleaned away. A
    character outside the alphabet becomes the unknown token.
    """
    in_bytes = section.tokenizer == "bytes"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) if in_bytes else section.characters
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token=UNKNOWN))  # without merges: one token a symbol
    if in_bytes:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
    else:
        backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        model_max_length=section.context,
    )


def language_model(section: ScratchModel, vocabulary: int, seed: int) -> Any:
    """A Llama with tied embeddings in fp32: matrices drawn with std 0.02 from `seed` alone, norms one."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=section.hidden,
        intermediate_size=section.mlp or 2 * section.hidden,
        num_hidden_layers=section.layers,
        num_attention_heads=section.heads,
        num_key_value_heads=section.heads,
        max_position_embeddings=section.context,
        tie_word_embeddings=True,
        initializer_range=INIT_STD,
        pad_token_id=SPECIAL.index(PAD),
        eos_token_id=SPECIAL.index(END),
        bos_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):  # building draws from the global generator; what it drew is replaced
        lm = LlamaForCausalLM(config)
    draws = generator(seed, "policy")
    with torch.no_grad():
        for _, parameter in sorted(lm.named_parameters()):
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, INIT_STD, generator=draws)
    lm.generation_config = GenerationConfig.from_model_config(config)
    return lm.eval()

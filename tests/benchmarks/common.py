"""What the benchmarks share: models, alternation, tables."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mrlm_cli.policy import pretrained
from mrlm_cli.training.loop import wait_for_device

# name -> (layers, hidden, mlp, heads, key heads, words): Llama shapes with tied embeddings; 135M is that of
# SmolLM2-135M, 0.5B and 1.5B those of Qwen2.5
SHAPES = {
    "1M": (4, 128, 384, 4, 4, 512),
    "3M": (4, 256, 688, 4, 4, 512),
    "30M": (12, 448, 1152, 7, 7, 4096),
    "135M": (30, 576, 1536, 9, 3, 49152),
    "0.5B": (24, 896, 4864, 14, 2, 151936),
    "1.5B": (28, 1536, 8960, 12, 2, 151936),
}


def language_model(name: str, context: int) -> Any:
    """A random model of one of SHAPES, or the pretrained one in a directory; fp32, as mrlm holds every model."""
    if name not in SHAPES:
        return pretrained.read(name)[0]
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, hidden, mlp, heads, key_heads, words = SHAPES[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return pretrained.settled(LlamaForCausalLM(config))


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call, from an idle GPU to an idle GPU where one is used."""
    wait_for_device()
    begun = time.perf_counter()
    work()
    wait_for_device()
    return time.perf_counter() - begun


def alternately(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, taken in turns, after one round that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            spent = seconds(work)
            if number:
                taken[name].append(spent)
    return {name: statistics.median(found) for name, found in taken.items()}


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; numbers are shown with three digits."""

    def shown(cell: object) -> str:
        if not isinstance(cell, float):
            return str(cell)
        return f"{cell:.3g}" if cell < 1000 else f"{cell:.0f}"

    lines = [columns, ["---"] * len(columns), *[[shown(cell) for cell in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

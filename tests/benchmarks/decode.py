"""Decoding by the cached engine against transformers' generate, alternately. Prints a table and one JSON line.

    python -m tests.benchmarks.decode --model models/smollm2-135m
    python -m tests.benchmarks.decode --model 3M --threads 1
    python -m tests.benchmarks.decode --model models/smollm2-135m --device cuda --cuda-graphs

Both sides have the same weights, precision, prompts (ragged, padded on the left for generate) and number of sampled
tokens; a sampled end token stops no row on either side. Ours returns log-probs too. Two workloads:

full      one batch; every row gets all new tokens
ragged    a rollout of several batches; the length of each row is drawn beforehand, 40 % of the limit on average.
          generate decodes each batch to its longest row; the engine has as many slots as generate has rows, and refills
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mrlm_cli.draws import draw_key
from mrlm_cli.engines.cached.engine import CachedEngine
from mrlm_cli.kernels import native
from mrlm_cli.records import Limits, Request
from tests.benchmarks.common import alternately, language_model, markdown

MEAN = 0.4  # of the limit, in ragged completions
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="3M", help="1M, 3M, 30M, 135M (random weights), or a model's directory")
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--workloads", nargs="+", default=["full", "ragged"], choices=["full", "ragged"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rows", type=int, default=128, help="rows of the ragged rollout")
    parser.add_argument("--shortest-prompt", type=int, default=16)
    parser.add_argument("--longest-prompt", type=int, default=48)
    parser.add_argument("--new", type=int, default=64, help="new tokens of a row at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--cuda-graphs", action="store_true", help="the engine replays its steps")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    native.use(True)
    lm = language_model(arguments.model, arguments.longest_prompt + arguments.new).to(arguments.device)
    results = [
        measure(lm, workload, precision, arguments)
        for workload in arguments.workloads
        for precision in arguments.precisions
    ]
    columns = ("workload", "precision", "sampled tokens", "generate, s", "here, s", "ratio")
    print(markdown(columns, [[each[column] for column in columns] for each in results]))
    print(json.dumps({"benchmark": "decode", **vars(arguments), "results": results}))


def measure(lm: Any, workload: str, precision: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians of both sides on one workload."""
    draws = random.Random(0)
    rows = arguments.batch if workload == "full" else arguments.rows
    words = int(lm.config.vocab_size)
    prompts = [
        tuple(draws.randrange(3, words) for _ in range(size))
        for size in [draws.randint(arguments.shortest_prompt, arguments.longest_prompt) for _ in range(rows)]
    ]
    lengths = [arguments.new] * rows if workload == "full" else ragged(rows, arguments.new, draws)
    works = {
        "theirs": theirs(copy.deepcopy(lm).to(PRECISIONS[precision]), prompts, lengths, arguments.batch),
        "ours": ours(lm, prompts, lengths, arguments.batch, precision, arguments.cuda_graphs),
    }
    taken = alternately(works, arguments.rounds)
    return {
        "workload": workload,
        "precision": precision,
        "sampled tokens": sum(lengths),
        "mean share of the limit": round(sum(lengths) / rows / arguments.new, 3),
        "generate, s": round(taken["theirs"], 3),
        "here, s": round(taken["ours"], 3),
        "ratio": round(taken["theirs"] / taken["ours"], 2),
        "tokens per second": round(sum(lengths) / taken["ours"]),
    }


def ragged(rows: int, limit: int, draws: random.Random) -> list[int]:
    """Lengths from 1 to the limit, long ones rare, MEAN of the limit on average."""
    return [max(1, math.ceil(limit * draws.betavariate(2 * MEAN, 2 * (1 - MEAN)))) for _ in range(rows)]


def ours(
    lm: Any, prompts: Sequence[tuple[int, ...]], lengths: Sequence[int], slots: int, precision: str, graphs: bool
) -> Callable[[], None]:
    """The engine's whole work after an update: take the weights, decode every row."""
    engine = CachedEngine(
        CachedEngine.Config(slots=slots, cuda_graphs=graphs),
        decode=lambda tokens: "",
        precision=precision,
        check=lambda: None,
    )
    requests = [
        Request(str(number), prompt, draw_key(0, "benchmark", number), Limits(length, 1.0, (), ignore_end=True))
        for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]

    def work() -> None:
        engine.load(lm)
        completions = engine.generate(requests)
        assert [len(each.tokens) for each in completions] == list(lengths)

    return work


def theirs(lm: Any, prompts: Sequence[tuple[int, ...]], lengths: Sequence[int], batch: int) -> Callable[[], None]:
    """generate over batches, each to its longest row."""
    lm.generation_config.eos_token_id = None
    lm.generation_config.pad_token_id = 0

    def work() -> None:
        for first in range(0, len(prompts), batch):
            part = prompts[first : first + batch]
            longest = max(map(len, part))
            tokens = torch.tensor([[0] * (longest - len(each)) + list(each) for each in part], device=lm.device)
            mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in part], device=lm.device)
            new = max(lengths[first : first + batch])
            out = lm.generate(
                input_ids=tokens, attention_mask=mask, max_new_tokens=new, do_sample=True, temperature=1.0, top_k=0
            )
            assert out.cpu().shape == (len(part), longest + new)  # the tokens themselves, as the engine returns them

    return work


if __name__ == "__main__":
    main()

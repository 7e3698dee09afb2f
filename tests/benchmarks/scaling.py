"""How cost grows: tokens per second of decoding and of the update over batch, completion length, model and threads.

    python -m tests.benchmarks.scaling --to scaling.json --picture tests/benchmarks/scaling.svg
    python -m tests.benchmarks.scaling --to scaling.json --parts batch model --threads 1

Random models of Llama shape, prompts of 32 tokens that share nothing, every completion of the full length. Each point
is measured once, after a small one of its kind has warmed up. Points already in the file `--to` are not measured
again, so the work can be done by part. Decoding counts sampled tokens, the update counts prompt and sampled tokens of
one pass (forward, backward, AdamW). Prints a table and writes it, with a picture, from all points of the file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mrlm_cli.draws import draw_key
from mrlm_cli.engines.cached.engine import CachedEngine
from mrlm_cli.kernels import native
from mrlm_cli.policy.model import Policy
from mrlm_cli.records import Limits, Request
from tests.benchmarks import picture
from tests.benchmarks.common import language_model, markdown, seconds

PROMPT = 32
BATCH, NEW, MODEL = 32, 64, "3M"  # what is held while one of them varies
SWEEPS: dict[str, tuple[Any, ...]] = {
    "batch": (1, 4, 16, 64, 256),
    "new": (16, 64, 256, 1024),
    "model": ("1M", "3M", "30M", "135M"),
}
MICRO_BATCH = 2048  # tokens of one forward and backward


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--to", type=Path, required=True, help="the JSON file of all points")
    parser.add_argument("--parts", nargs="+", default=list(SWEEPS), choices=SWEEPS)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--precision", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--picture", type=Path, help="an SVG file")
    arguments = parser.parse_args()
    found: dict[str, dict[str, Any]] = json.loads(arguments.to.read_text()) if arguments.to.exists() else {}
    for threads in arguments.threads:
        for point in points(arguments.parts):
            key = "{model}, batch {batch}, new {new}".format(**point) + f", {threads} threads, {arguments.precision}"
            if key not in found:
                found[key] = {**point, "threads": threads, "precision": arguments.precision}
                found[key] |= measure(**found[key])
                arguments.to.write_text(json.dumps(found, indent=1))
    columns = ("model", "batch", "new", "threads", "precision", "decode tokens/s", "update tokens/s")
    print(markdown(columns, [[each[column] for column in columns] for each in found.values()]))
    if arguments.picture is not None:
        arguments.picture.write_text(
            picture.of([panel(list(found.values()), part) for part in SWEEPS]), encoding="utf-8"
        )
    print(json.dumps({"benchmark": "scaling", "points": list(found.values())}))


def points(parts: list[str]) -> Iterator[dict[str, Any]]:
    """The grid: one of batch, new and model varies, the others stay."""
    for part in parts:
        for value in SWEEPS[part]:
            yield {"model": MODEL, "batch": BATCH, "new": NEW, part: value}


def measure(model: str, batch: int, new: int, threads: int, precision: str) -> dict[str, float]:
    """Tokens per second of decoding and of the update."""
    torch.set_num_threads(threads)
    native.use(True)
    lm = language_model(model, PROMPT + new)
    policy = Policy(lm, None, precision=precision)
    adam = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True)
    engine = CachedEngine(
        CachedEngine.Config(slots=batch, max_cached_tokens=batch * (PROMPT + new)),
        decode=lambda tokens: "",
        precision=precision,
        check=lambda: None,
    )
    tokens = torch.randint(
        3, int(lm.config.vocab_size), (batch, PROMPT + new), generator=torch.Generator().manual_seed(0)
    )

    def decode(rows: int, count: int) -> None:
        engine.load(lm)
        limits = Limits(count, 1.0, (), ignore_end=True)
        engine.generate(
            [
                Request(str(row), tuple(tokens[row, :PROMPT].tolist()), draw_key(0, "benchmark", row), limits)
                for row in range(rows)
            ]
        )

    def update(rows: int) -> None:
        size = max(1, MICRO_BATCH // tokens.shape[1])
        for first in range(0, rows, size):
            part = tokens[first : min(first + size, rows)]
            score = torch.zeros(part.shape, dtype=torch.bool)
            score[:, PROMPT:] = True
            lengths = torch.full((len(part),), part.shape[1])
            policy(part, lengths, score, temperature=1.0).logprobs.sum().backward()
        adam.step()
        adam.zero_grad()

    decode(1, 4)
    update(1)
    return {
        "decode tokens/s": round(batch * new / seconds(lambda: decode(batch, new)), 1),
        "update tokens/s": round(batch * (PROMPT + new) / seconds(lambda: update(batch)), 1),
    }


def panel(found: list[dict[str, Any]], part: str) -> picture.Panel:
    """The curves over one of batch, new and model, for each thread count."""
    fixed = {"model": MODEL, "batch": BATCH, "new": NEW}
    del fixed[part]
    curves: dict[str, list[tuple[float, float]]] = {}
    for each in found:
        if any(each[name] != value for name, value in fixed.items()):
            continue
        x = float(each[part].rstrip("M")) if part == "model" else float(each[part])
        for what in ("decode", "update"):
            name = f"{what}, {each['threads']} threads, {each['precision']}"
            curves.setdefault(name, []).append((x, each[f"{what} tokens/s"]))
    label = {"batch": "rows", "new": "new tokens of a row", "model": "million parameters"}[part]
    return picture.Panel(label, "tokens a second", {name: sorted(curve) for name, curve in curves.items()})


if __name__ == "__main__":
    main()

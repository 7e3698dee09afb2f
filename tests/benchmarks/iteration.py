"""Time one PPO iteration by phase: rollout, scoring, update. Prints one JSON line.

    python -m tests.benchmarks.iteration --model tiny
    python -m tests.benchmarks.iteration --model models/smollm2-135m --precision bfloat16

The work of an iteration: 32 episodes (or `--episodes`) of 32 prompt tokens and exactly 64 new tokens each (a sampled
end token does not stop a row), entropy, KL against the starting policy (unless `--kl 0`) and, in PPO, value loss on;
PPO makes 4 passes over as many prompts in one minibatch, GRPO one pass over prompts sampled 4 times each. The
first iteration warms up and is not counted; what is quoted is the median of the others. Times of one machine mean
little: compare with a peer's in the same session. `share_of_peak` sets the useful operations of the update (forward
and backward of products and attention, each distinct prefix once, no recomputation) against the fastest product of
that precision measured here with as many threads.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mrlm_cli import registry
from mrlm_cli.policy.model import Policy
from mrlm_cli.policy.value import Critic
from mrlm_cli.recipe import sections
from mrlm_cli.recipe.schema import Recipe
from mrlm_cli.records import Completion
from mrlm_cli.training import loop
from mrlm_cli.training.announce import Announcer
from mrlm_cli.training.rundir import RunDirectory
from mrlm_cli.training.stage import Stage, settled
from mrlm_cli.training.stopping import Stopper
from mrlm_cli.training.trainer import Trainer
from tests.benchmarks import limits

# Expressions come first, so that no two prompts share a beginning that could be computed once.
QUESTION = "{expression} " + "the of one two tree river count each box had three more than gave left total " * 4
PROMPT, NEW = 32, 64
PASSES = 4  # of PPO; GRPO makes one
SAMPLES = 4  # of each prompt, in GRPO


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny", help="tiny (3.2M parameters), or a pretrained model's directory")
    parser.add_argument("--algorithm", default="ppo", choices=["ppo", "grpo"])
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--value", default="shared", choices=["shared", "separate"])
    parser.add_argument("--kl", type=float, default=0.05, help="coefficient of the KL; with 0 there is no reference")
    parser.add_argument("--entropy", type=float, default=0.01, help="coefficient of the entropy (measured anyway)")
    parser.add_argument("--episodes", type=int, default=32, help="a multiple of 4")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--tokens-per-micro-batch", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--cuda-graphs", action="store_true", help="decoding replays its steps")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments)))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp())
    try:
        return _measure(arguments, folder)
    finally:
        shutil.rmtree(folder)


def _measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    value = {"type": arguments.value}
    model: Any = (
        sections.ScratchModel(type="scratch", layers=4, hidden=256, mlp=688, tokenizer="bytes", value=value)
        if arguments.model == "tiny"
        else sections.PretrainedModel(
            type="pretrained", path=arguments.model, value=value, chat=sections.Chat(template="plain")
        )
    )
    per_task, passes = (1, PASSES) if arguments.algorithm == "ppo" else (SAMPLES, 1)
    arithmetic = registry.resolve("environments", "arithmetic")
    recipe = settled(
        Recipe(
            name="iteration",
            steps=arguments.iterations + 1,
            model=model,
            environments=(arithmetic.Config(type="arithmetic", digits=4, prompt=QUESTION),),
            sampling=sections.Sampling(
                tasks_per_step=arguments.episodes // per_task,
                episodes_per_task=per_task,
                max_new_tokens=NEW,
                max_tokens=PROMPT + NEW,
            ),
            algorithm=registry.resolve("algorithms", arguments.algorithm).Config(
                type=arguments.algorithm, kl={"coef": arguments.kl}, entropy={"coef": arguments.entropy}
            ),
            optimizer=sections.Optimizer(
                lr=1e-6, passes=passes, tokens_per_micro_batch=arguments.tokens_per_micro_batch
            ),
            hardware=sections.Hardware(
                device=arguments.device, threads=arguments.threads, precision=arguments.precision
            ),
            engine=registry.resolve("engines", "cached").Config(cuda_graphs=arguments.cuda_graphs),
        )
    )
    run = RunDirectory.create(folder / "run", recipe_yaml="", origins={}, machine={})
    announce = Announcer([])
    with (
        Stopper() as stopper,
        Stage(recipe, (folder,), journal=run.journal, check=stopper.check, phase=announce.phase) as stage,
        run.lock(),
    ):
        trainer = Trainer(recipe, (folder,), stage, run, announce)
        _fixed_work(stage)
        trainer.engine.load(trainer.policy.lm)
        peak = limits.peak(arguments.precision, arguments.device)
        for _ in range(arguments.iterations + 1):
            loop.iteration(trainer)
        rows = run.metrics()
        operations = passes * useful_operations(trainer.policy, arguments.episodes, per_task)
        # A neighbour may have taken a core during one of them.
        peak = max(peak, limits.peak(arguments.precision, arguments.device))
    counted = rows[1:] or rows
    phases = ("seconds", "rollout_seconds", "scoring_seconds", "update_seconds", "tokens_per_second")
    return {
        "benchmark": "iteration",
        **vars(arguments),
        "threads": recipe.hardware.threads,
        "parameters": sum(each.numel() for each in trainer.policy.parameters()),
        "sampled_tokens": int(rows[-1]["length"] * rows[-1]["episodes"]),
        **{name: round(statistics.median(row[name] for row in counted), 3) for name in phases},
        "update_gflop": round(operations / 1e9, 1),
        "peak_gflop_per_second": round(peak, 1),
        "share_of_peak": round(
            operations / 1e9 / peak / statistics.median(each["update_seconds"] for each in counted), 3
        ),
        "first_iteration_seconds": round(rows[0]["seconds"], 3),
        "memory_mb": round(rows[-1]["memory_mb"]),
    }


def useful_operations(policy: Policy, episodes: int, per_task: int) -> float:
    """Floating-point operations of forward and backward over an iteration's episodes, once each.

    6 per weight of a product and token, 12·(attention's width) per layer and pair of a token and one that it sees; the
    head runs where a token was sampled, and what follows the last layer's attention there and at the end.
    """
    prefixes = episodes // per_task * PROMPT + episodes * NEW
    # Of a prompt its last token is read, of a reply all but, without values, the last.
    read = episodes // per_task + episodes * (NEW if policy.value is not None else NEW - 1)
    own = PROMPT + NEW
    pairs = episodes // per_task * PROMPT * (PROMPT + 1) / 2 + episodes * (own * (own + 1) - PROMPT * (PROMPT + 1)) / 2

    def of(trunk: Any) -> float:
        matrices = [part for part in trunk.modules() if isinstance(part, torch.nn.Linear)]
        width = trunk.config.num_attention_heads * trunk.layers[0].self_attn.head_dim
        mlp = trunk.layers[-1].mlp
        behind = [trunk.layers[-1].self_attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        return float(
            6 * prefixes * sum(each.weight.numel() for each in matrices)
            - 6 * (prefixes - read) * sum(each.weight.numel() for each in behind)
            + 12 * width * pairs * trunk.config.num_hidden_layers
        )

    head = 6 * episodes * NEW * policy.lm.get_output_embeddings().weight.numel()
    critic = of(policy.value.trunk) if isinstance(policy.value, Critic) else 0.0
    return of(policy.lm.base_model) + head + critic


def _fixed_work(stage: Stage) -> None:
    """Every prompt is cut to 32 tokens, every reply has exactly 64."""
    opened, generate = stage.chat.open, stage.engine.generate

    def cut(*given: Any) -> Any:
        return [(kind, tokens[:PROMPT]) for kind, tokens in opened(*given)]

    def full(requests: Any) -> list[Completion]:
        return generate([replace(each, limits=replace(each.limits, ignore_end=True)) for each in requests])

    stage.chat.open = cut  # type: ignore[method-assign]
    stage.engine.generate = full  # type: ignore[method-assign]


if __name__ == "__main__":
    main()

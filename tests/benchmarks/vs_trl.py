"""The same PPO or GRPO iteration here and in TRL, alternately, from one command. Prints a table and one JSON line.

    python tests/benchmarks/vs_trl.py ppo-tiny grpo-tiny --peer trl-env/bin/python --trl112 trl112

TRL needs an environment of its own, and a folder with its last release that had PPO:

    python -m venv trl-env
    trl-env/bin/pip install "torch>=2.11,<2.14" trl==1.16.0 transformers accelerate datasets
    trl-env/bin/pip install --no-deps --target trl112 trl==1.12.0

On a GPU, with a random model of the shape of a larger one, larger micro-batches here, and TRL's default of 8 rows:

    python -m tests.benchmarks.shaped 0.5B models/shaped --tokenizer models/smollm2-135m
    python tests/benchmarks/vs_trl.py ppo-smollm2 grpo-smollm2 --smollm2 models/shaped --device cuda --cuda-graphs \\
        --tokens-per-micro-batch 32768 --peer trl-env/bin/python --trl112 trl112

Work of one iteration: 32 episodes (or `--episodes`) of 32 prompt tokens and exactly 64 sampled tokens; PPO makes 4
passes in one minibatch, GRPO samples each prompt 4 times and makes one pass. Cases with the same peer share its runs:
a round runs ours of every such case, then the peer. Both sides use the same number of threads; each leaves its first
iteration uncounted unless `--iterations 0` asks for a single cold one. Ratios are of medians over the rounds: TRL's
seconds over ours.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
GRPO_KL = ["--precision", "bfloat16", "--algorithm", "grpo", "--kl", "0.04", "--entropy", "0"]
# TRL's defaults: no KL, so no reference. Entropy is measured on both sides.
GRPO, TRL_DEFAULTS = [*GRPO_KL, "--kl", "0"], ["--beta", "0"]
# Micro-batches as a recipe has them by default, where memory is no question; TRL's are 8 rows by default.
TINY = ["--model", "tiny", "--tokens-per-micro-batch", "4096"]
# case -> (our arguments, the peer's script, the peer's arguments)
CASES: dict[str, tuple[list[str], str, list[str]]] = {
    "ppo-tiny": ([*TINY, "--precision", "bfloat16"], "trl_ppo.py", ["--model", "tiny"]),
    "ppo-smollm2": (["--precision", "bfloat16"], "trl_ppo.py", ["--model", "smol"]),
    "ppo-smollm2-critic": (["--precision", "bfloat16", "--value", "separate"], "trl_ppo.py", ["--model", "smol"]),
    "ppo-smollm2-fp32": (["--precision", "float32"], "trl_ppo.py", ["--model", "smol", "--bf16", "0"]),
    "grpo-tiny": ([*TINY, *GRPO], "trl_grpo.py", ["--model", "tiny", *TRL_DEFAULTS]),
    "grpo-tiny-kl": ([*TINY, *GRPO_KL], "trl_grpo.py", ["--model", "tiny"]),
    "grpo-smollm2": (GRPO, "trl_grpo.py", ["--model", "smol", *TRL_DEFAULTS]),
    "grpo-smollm2-kl": (GRPO_KL, "trl_grpo.py", ["--model", "smol"]),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="+", choices=CASES)
    parser.add_argument("--peer", type=Path, required=True, help="the Python of TRL's environment")
    parser.add_argument("--trl112", type=Path, help="the folder that holds TRL 1.12, for PPO")
    parser.add_argument("--smollm2", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=1, help="counted iterations of each side in a round")
    parser.add_argument("--episodes", type=int, default=32, help="of an iteration; a multiple of 8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of both sides")
    parser.add_argument("--cuda-graphs", action="store_true", help="ours replays its decoding steps")
    parser.add_argument("--tokens-per-micro-batch", type=int, help="ours, instead of a case's own")
    arguments = parser.parse_args()
    together: dict[str, list[str]] = {}
    for case in arguments.cases:
        together.setdefault(str(CASES[case][1:]), []).append(case)
    results = [result for cases in together.values() for result in measure(cases, arguments)]
    print(f"{'case':20} {'TRL s':>9} {'ours s':>9} {'ratio':>7}   {'TRL MB':>7} {'ours MB':>7}")
    for result in results:
        print(
            f"{result['case']:20} {result['peer_seconds']:9.2f} {result['our_seconds']:9.2f} {result['ratio']:6.1f}x"
            f"   {result['peer_memory_mb']:7.0f} {result['our_memory_mb']:7.0f}"
        )
    print(
        json.dumps(
            {"benchmark": "vs_trl", "threads": arguments.threads, "device": arguments.device, "results": results}
        )
    )


def measure(cases: list[str], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians over the rounds of cases with one peer, each of ours and the peer's."""
    ours: dict[str, list[dict[str, Any]]] = {case: [] for case in cases}
    theirs: list[dict[str, Any]] = []
    both = ["--threads", str(arguments.threads), "--device", arguments.device]
    here = ["--cuda-graphs"] if arguments.cuda_graphs else []
    if arguments.tokens_per_micro_batch is not None:
        here += ["--tokens-per-micro-batch", str(arguments.tokens_per_micro_batch)]
    _, script, peer_given = CASES[cases[0]]
    grpo = script == "trl_grpo.py"
    work = ["--prompts", str(arguments.episodes // 4)] if grpo else ["--rollouts", str(arguments.episodes)]
    for _ in range(arguments.rounds):
        for case in cases:
            given = CASES[case][0]
            if "--model" not in given:
                given = ["--model", str(arguments.smollm2), *given]
            counted = ["--iterations", str(arguments.iterations), "--episodes", str(arguments.episodes)]
            ours[case].append(
                run([sys.executable, str(HERE / "iteration.py"), *given, *counted, *here, *both], arguments)
            )
        steps = ["--steps", str(arguments.iterations + 1)]
        peer = [str(arguments.peer), str(HERE / "peers" / script), *peer_given]
        theirs.append(run([*peer, *work, *steps, *both], arguments))
    return [compared(case, ours[case], theirs) for case in cases]


def compared(case: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of the table."""
    our_seconds = statistics.median(each["seconds"] for each in ours)
    peer_seconds = statistics.median(each["step_s"] for each in theirs)
    assert {each["sampled_tokens"] for each in ours} == {each["sampled_tok"] for each in theirs}
    return {
        "case": case,
        "rounds": len(ours),
        "peer": f"TRL {theirs[0]['trl']}",
        "peer_seconds": peer_seconds,
        "our_seconds": our_seconds,
        "ratio": round(peer_seconds / our_seconds, 2),
        "peer_memory_mb": max(each["peak_memory_mb"] for each in theirs),
        "our_memory_mb": max(each["memory_mb"] for each in ours),
        "ours": ours,
        "theirs": theirs,
    }


def run(command: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """The JSON object that a benchmark prints last. Raises SystemExit with its output if it fails."""
    environment = os.environ | {
        "SMOLLM2": str(arguments.smollm2),
        "TRL112": str(arguments.trl112 or ""),
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    if Path(command[0]) == arguments.peer:
        environment.pop("PYTHONPATH")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


if __name__ == "__main__":
    main()

"""What the sandbox costs on top of the program itself: `python tests/benchmarks/sandbox_cost.py [RUNS]`.

For every mechanism that works here: the median wall time of a run of eight tests, less that of the same interpreter
started bare on the same program, one at a time and two at once.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from mrlm_cli.envs.sandbox import probe
from mrlm_cli.envs.sandbox.mechanisms import STRONGEST_FIRST
from mrlm_cli.envs.sandbox.records import Call, Job, Limits

PROGRAM = "def solve(x):\n    return sum(v * v for v in x)\n"
TESTS = tuple(Call((list(range(n)),)) for n in range(8))
BARE = PROGRAM + "for n in range(8):\n    print(solve(list(range(n))))\n"


def median(act: Callable[[], object], runs: int, at_once: int = 1) -> float:
    """Milliseconds of one call, `at_once` of them running side by side."""

    def timed(_: int) -> float:
        start = time.perf_counter()
        act()
        return 1000 * (time.perf_counter() - start)

    with ThreadPoolExecutor(at_once) as pool:
        return statistics.median(pool.map(timed, range(runs)))


def main(runs: int) -> None:
    """Print a table."""
    for kind in STRONGEST_FIRST:
        sandbox = probe.attempt(kind)
        if isinstance(sandbox, str):
            print(f"{kind.name}: {sandbox}")
            continue
        command = [str(sandbox.mechanism.python.executable), "-s", "-S", "-B", "-c", BARE]
        job = Job(PROGRAM, "calls", TESTS, "solve")
        for at_once in (1, 2):
            bare = median(partial(subprocess.run, command, stdout=subprocess.DEVNULL, check=True), runs, at_once)
            boxed = median(partial(sandbox.run, job, Limits()), runs, at_once)
            print(f"{sandbox.name}, {at_once} at once: bare {bare:.1f} ms, sandboxed {boxed:.1f}, + {boxed - bare:.1f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)

"""Matrix products of linear layers: the kernel in C against torch's and oneDNN's, alternately, in GFLOP/s.

    python -m tests.benchmarks.products

Of each pair the first quartile of the times: a neighbour on the machine only ever adds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from mrlm_cli.kernels import native, products
from tests.benchmarks.common import markdown

# Rows, outputs, inputs: SmolLM2's matrices at 8 and 32 episodes, its head, those of the tiny model, and wider ones.
SHAPES = [(rows, *shape) for rows in (764, 3056) for shape in ((960, 576), (576, 576), (3072, 576), (576, 1536))]
SHAPES += [(512, 49152, 576), (3056, 1376, 256), (3056, 256, 688), (4096, 9728, 896), (4096, 896, 4864)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if (reason := native.missing()) is not None:
        raise SystemExit(f"no kernels here: {reason}")
    columns = ["precision", "rows", "outputs", "inputs", "forward", "of inputs", "of weights, added in float32"]
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for shape in SHAPES:
            pairs = _rates(dtype, *shape, arguments.repeats)
            rates = [f"{library:.0f} → {kernel:.0f}" for library, kernel in pairs]
            found.append([str(dtype).removeprefix("torch."), *shape, *rates])
    print(markdown(columns, found))


def _rates(dtype: torch.dtype, rows: int, outputs: int, inputs: int, repeats: int) -> list[tuple[float, float]]:
    """GFLOP/s without and with the kernels, of the forward and of both gradients."""
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    given, total = torch.randn(rows, outputs).to(dtype), torch.zeros(outputs, inputs)

    def add() -> None:
        if not products.add_weight_gradient(total, given, x):
            total.add_(products.weight_gradient(given, x))

    works: list[Callable[[], object]] = [
        lambda: products.linear(x, weight),
        lambda: products.input_gradient(given, weight),
        add,
    ]
    operations = 2 * rows * outputs * inputs / 1e9
    found: list[tuple[float, float]] = []
    for work in works:
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(repeats + 1):
            for wanted, seconds in times.items():
                native.use(wanted)
                begun = time.perf_counter()
                work()
                seconds.append(time.perf_counter() - begun)
        library, kernel = (operations / statistics.quantiles(times[each][1:], n=4)[0] for each in (False, True))
        found.append((library, kernel))
    return found


if __name__ == "__main__":
    main()

"""What this machine can do at most: matrix products by precision and threads, and memory bandwidth.

    python -m tests.benchmarks.limits

GFLOP/s of the fastest of several square-ish products as training makes them, the best of many runs; GB/s of a sum into
a third array that no cache holds (two reads and one write). Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch

from tests.benchmarks.common import markdown, seconds

SIZES = ((1024, 1024, 1024), (1024, 576, 1536), (2048, 1536, 576), (4096, 2048, 2048))  # rows, inputs, outputs
LARGE = 2**25  # numbers in an array: 128 MiB


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    found = [{"threads": threads, **measure(threads)} for threads in arguments.threads]
    columns = list(found[0])
    print(markdown(columns, [[each[column] for column in columns] for each in found]))
    print(json.dumps({"benchmark": "limits", "torch": torch.__version__, "results": found}))


def measure(threads: int) -> dict[str, float]:
    """Every limit with that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return {
            "float32 GFLOP/s, torch's default": round(_products(torch.float32, torch.nn.functional.linear), 1),
            "float32 GFLOP/s, oneDNN": round(_products(torch.float32, _onednn), 1),
            "bfloat16 GFLOP/s": round(_products(torch.bfloat16, torch.nn.functional.linear), 1),
            "GB/s": round(bandwidth(), 1),
        }
    finally:
        torch.set_num_threads(before)


def peak(precision: str) -> float:
    """GFLOP/s of the fastest product of a precision with the present number of threads."""
    if precision == "bfloat16":
        return _products(torch.bfloat16, torch.nn.functional.linear)
    return max(_products(torch.float32, torch.nn.functional.linear), _products(torch.float32, _onednn))


def bandwidth() -> float:
    """GB/s of c = a + b."""
    a, b, c = (torch.ones(LARGE) for _ in range(3))
    return 3 * 4 * LARGE / min(seconds(lambda: torch.add(a, b, out=c)) for _ in range(8)) / 1e9


def _onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return product


@torch.no_grad()
def _products(dtype: torch.dtype, product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
    best = 0.0
    for rows, inputs, outputs in SIZES:
        x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
        spent = min(seconds(lambda x=x, weight=weight: product(x, weight)) for _ in range(12))  # type: ignore[misc]
        best = max(best, 2 * rows * inputs * outputs / spent / 1e9)
    return best


if __name__ == "__main__":
    main()

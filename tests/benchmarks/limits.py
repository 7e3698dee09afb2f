"""What this machine can do at most: matrix products by precision and threads, and memory bandwidth.

    python -m tests.benchmarks.limits
    python -m tests.benchmarks.limits --device cuda

GFLOP/s of the fastest of several square-ish products as training makes them, the best of many runs; GB/s of a sum into
a third array that no cache holds (two reads and one write). Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch

from mrlm_cli.kernels import native, products
from tests.benchmarks.common import markdown, seconds

SIZES = ((1024, 1024, 1024), (1024, 576, 1536), (2048, 1536, 576), (4096, 2048, 2048))  # rows, inputs, outputs
GPU_SIZES = ((8192, 8192, 8192),)
LARGE = 2**25  # numbers in an array: 128 MiB
GPU_LARGE = 2**29


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    native.use(True)
    found: list[dict[str, float]] = (
        [{"threads": threads, **measure(threads)} for threads in arguments.threads]
        if arguments.device == "cpu"
        else [measure_gpu()]
    )
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
            "float32 GFLOP/s, mrlm": round(_products(torch.float32, products.linear), 1),
            "bfloat16 GFLOP/s, torch's": round(_products(torch.bfloat16, torch.nn.functional.linear), 1),
            "bfloat16 GFLOP/s, mrlm": round(_products(torch.bfloat16, products.linear), 1),
            "GB/s": round(bandwidth(), 1),
        }
    finally:
        torch.set_num_threads(before)


def measure_gpu() -> dict[str, float]:
    """Every limit of the GPU."""
    return {
        "float32 GFLOP/s": round(peak("float32", "cuda")),
        "bfloat16 GFLOP/s": round(peak("bfloat16", "cuda")),
        "GB/s": round(bandwidth("cuda")),
    }


def peak(precision: str, device: str = "cpu") -> float:
    """GFLOP/s of the fastest product of a precision at hand, on CPUs with the present number of threads."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    ways = [products.linear] if device == "cpu" else []
    if (device, precision) == ("cpu", "float32"):
        ways.append(_onednn)
    if device != "cpu" or precision == "float32" or native.multiplies_bfloat16():
        ways.append(torch.nn.functional.linear)
    return max(_products(dtype, way, device) for way in ways)


def bandwidth(device: str = "cpu") -> float:
    """GB/s of c = a + b."""
    count = LARGE if device == "cpu" else GPU_LARGE
    a, b, c = (torch.ones(count, device=device) for _ in range(3))
    return 3 * 4 * count / min(seconds(lambda: torch.add(a, b, out=c)) for _ in range(8)) / 1e9


def _onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return product


@torch.no_grad()
def _products(
    dtype: torch.dtype, product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], device: str = "cpu"
) -> float:
    best = 0.0
    for rows, inputs, outputs in SIZES if device == "cpu" else GPU_SIZES:
        x, weight = (torch.randn(count, inputs, device=device).to(dtype) for count in (rows, outputs))
        spent = min(seconds(lambda x=x, weight=weight: product(x, weight)) for _ in range(12))  # type: ignore[misc]
        best = max(best, 2 * rows * inputs * outputs / spent / 1e9)
    return best


if __name__ == "__main__":
    main()

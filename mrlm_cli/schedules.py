"""Shapes over a run's steps, for learning rates and coefficients."""

import math

from mrlm_cli.records import Progress
from mrlm_cli.strict import Schedule


def factor(shape: Schedule, progress: Progress, *, floor: float = 0.0, warmup: int = 0) -> float:
    """The factor in force at `progress.step`: a linear rise over `warmup` steps, then `shape` from 1 towards `floor`.

    linear: floor + (1 − floor)(1 − x); cosine: floor + (1 − floor)(1 + cos πx)/2, with x the share done of the steps
    after the warm-up. The rise starts at 1/(warmup + 1), so that the first step does something.
    """
    if progress.step < warmup:
        return (progress.step + 1) / (warmup + 1)
    if shape == "constant":
        return 1.0
    done = (progress.step - warmup) / max(1, progress.steps - warmup)
    fall = 1 - done if shape == "linear" else (1 + math.cos(math.pi * done)) / 2
    return floor + (1 - floor) * fall

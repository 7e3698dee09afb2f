"""What a run did before it was resumed, read back from its directory for the curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; an unfinished last line is left out. Raises OSError, ValueError."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().split(b"\n")[:-1]]


def read_evaluations(run: Path) -> list[dict[str, Any]]:
    """The evaluations on the validation split, by step. Raises OSError, ValueError."""
    found = [json.loads(path.read_bytes()) for path in sorted((run / "eval").glob("step-*[0-9].json"))]
    return sorted((one for one in found if one["split"] == "validation"), key=lambda one: one["step"])

"""What there is, each with one line."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from pathlib import Path

from mrlm_cli import registry
from mrlm_cli.errors import UnknownName
from mrlm_cli.metrics import METRICS
from mrlm_cli.recipe import compose


def listed(kind: str | None) -> dict[str, dict[str, str]]:
    """{kind: {name: one line}} of one kind or of all. Raises UnknownName."""
    makers: dict[str, Callable[[], dict[str, str]]] = {
        "recipes": lambda: _files("recipes"),
        "fragments": lambda: _files("configs"),
        "environments": lambda: _registered("environments"),
        "rewards": lambda: _registered("rewards"),
        "algorithms": lambda: _registered("algorithms"),
        "data": lambda: _registered("data"),
        "engines": lambda: _registered("engines"),
        "metrics": lambda: {name: metric.sentence for name, metric in METRICS.items()},
        "runs": _runs,
    }
    if kind is None:
        return {name: make() for name, make in makers.items()}
    if kind not in makers:
        close = difflib.get_close_matches(kind, makers, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(makers)}"
        raise UnknownName(f"nothing of kind {kind} can be listed; {hint}")
    return {kind: makers[kind]()}


def _files(kind: str) -> dict[str, str]:
    return {name: _headline(path) for name, path in compose.shipped(kind).items()}


def _headline(path: Path) -> str:
    """The first comment of a file, without the file's own name."""
    with path.open(encoding="utf-8") as file:
        first = file.readline().lstrip("# ").strip()
    return first.removeprefix(f"recipes/{path.name}:").strip()


def _registered(kind: str) -> dict[str, str]:
    """A class's first sentence; a plugin is imported only when a recipe names it, so it shows where it lies."""
    lines: dict[str, str] = {}
    for name, place in registry.names(kind).items():
        if name in registry.BUILT_IN[kind]:
            lines[name] = (registry.resolve(kind, name).__doc__ or "").strip().partition("\n")[0]
        else:
            lines[name] = f"plugin {place}"
    return lines


def _runs() -> dict[str, str]:
    """Runs under ./runs: the last step, and held-out exactness where it was evaluated."""
    found: dict[str, str] = {}
    for path in sorted(Path("runs").glob("*/recipe.yaml")):
        run = path.parent
        if run.name.startswith("."):
            continue
        text = f"step {_last_step(run / 'metrics.jsonl')}"
        evaluations = sorted((run / "eval").glob("step-*[0-9].json"))
        if evaluations:
            exact = json.loads(evaluations[-1].read_text(encoding="utf-8")).get("components", {}).get("exact")
            text += f", held-out exact {exact['mean']:.3f}" if exact else ""
        found[str(run)] = text
    return found


def _last_step(metrics: Path) -> int:
    """The step of the last whole line; 0 before the first."""
    if not metrics.is_file():
        return 0
    lines = metrics.read_bytes().split(b"\n")[:-1]  # behind the last newline there is nothing, or half a line
    return int(json.loads(lines[-1])["step"]) if lines else 0

"""Writing checkpoints: whole or absent, no pickle. Needs no torch; what is inside is the caller's.

    checkpoints/step-000040/     any files; manifest.json (written last) holds bytes and sha256 of each
    checkpoints/latest, best     relative symbolic links, replaced by rename

What whole means, and which one a run goes on from, `recipe/checkpoints.py` says.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mrlm_cli.errors import CheckpointError
from mrlm_cli.recipe.checkpoints import (
    MANIFEST,
    MANIFEST_VERSION,
    below,
    name,
    newest_whole,
    sha256,
    step_of,
    verify,
)
from mrlm_cli.training import durable

__all__ = [
    "MANIFEST",
    "mark_best",
    "mark_latest",
    "name",
    "newest_whole",
    "prune",
    "state",
    "step_of",
    "sweep",
    "verify",
    "write",
]


def write(parent: Path, step: int, fill: Callable[[Path], None]) -> Path:
    """Write the checkpoint of `step` below `parent` and point `latest` to it.

    `fill(directory)` writes the files. An earlier checkpoint of the same step (after a replay) is replaced; at every
    moment one of the two can be found by `newest_whole`. Raises CheckpointError if the disk refuses, inside `fill` too;
    every earlier checkpoint is then as it was. Anything else that `fill` raises passes through, the temporary removed.
    """
    target = parent / name(step)
    building = durable.temporary(target)
    try:
        building.mkdir(parents=True)
        fill(building)
        manifest = json.dumps({"version": MANIFEST_VERSION, "step": step, "files": _digests(building)}, indent=2)
        durable.sync_tree(building)
        durable.write_whole(building / MANIFEST, manifest.encode())
        _install(building, target)
        durable.point(parent / "latest", target.name)
    except (OSError, SafetensorError) as error:
        durable.remove(building)
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {parent}: {error}; earlier checkpoints are intact"
        ) from error
    except BaseException:
        durable.remove(building)
        raise
    return target


def _install(building: Path, target: Path) -> None:
    old = target.with_name(f"{target.name}.replaced")
    if target.exists():
        if old.exists():
            _discard(old)
        os.rename(target, old)
        durable.sync(target.parent)
    os.rename(building, target)
    durable.sync(target.parent)
    if old.exists():
        _discard(old)


def state(directory: Path) -> dict[str, Any]:
    """What state.json holds. Raises CheckpointError if it is missing or no state of a run."""
    path = directory / "state.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("step"), int):
        raise CheckpointError(f"{path} is not the state of a run")
    return found


def mark_latest(parent: Path, step: int) -> None:
    """Point `latest` to the checkpoint of `step`: a kill may have come before `write` did. Raises CheckpointError."""
    with _disk(f"{parent / 'latest'} could not be replaced"):
        durable.point(parent / "latest", name(step))


def mark_best(parent: Path, step: int) -> None:
    """Point `best` to the checkpoint of `step`. Raises CheckpointError if there is none or the disk refuses."""
    if not (parent / name(step)).is_dir():
        raise CheckpointError(f"{parent / name(step)} does not exist and cannot become the best checkpoint")
    with _disk(f"{parent / 'best'} could not be replaced"):
        durable.point(parent / "best", name(step))


def prune(parent: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints up to `latest`, and the one that `best` points to.

    Checkpoints beyond `latest` are broken remains that the replay has not reached yet: they count for nothing and stay.
    """
    targets = {link: os.readlink(parent / link) for link in ("latest", "best") if (parent / link).is_symlink()}
    if "latest" not in targets:
        return
    newest = step_of(Path(targets["latest"]))
    reached = sorted((path for path in below(parent) if step_of(path) <= newest), key=step_of)
    with _disk(f"old checkpoints in {parent} could not be removed"):
        for path in reached[: max(0, len(reached) - keep)]:
            if path.name not in targets.values():
                _discard(path)


def sweep(parent: Path) -> None:
    """Remove what killed writers left behind; only for the process that holds the run's lock."""
    with _disk(f"stale files in {parent} could not be removed"):
        durable.sweep(parent)
        for path in below(parent):
            if path.name.endswith(".replaced"):
                successor = parent / name(step_of(path))
                if successor.exists():
                    _discard(path)
                else:
                    os.rename(path, successor)
                    durable.sync(parent)


@contextmanager
def _disk(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{what}: {error}") from error


def _discard(path: Path) -> None:
    # Renamed first: a kill while files are being deleted must not leave something that looks like a checkpoint.
    aside = durable.temporary(path)
    os.rename(path, aside)
    durable.remove(aside)


def _digests(directory: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files
    }

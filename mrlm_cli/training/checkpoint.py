"""Checkpoints on disk: whole or absent, verified before use, no pickle. Needs no torch; what is inside is the caller's.

    checkpoints/step-000040/     any files; manifest.json (written last) holds bytes and sha256 of each
    checkpoints/latest, best     relative symbolic links, replaced by rename

Whole means that the manifest is there and every file it names has its size and sha256. Files it does not name are
ignored. Not covered: a disk that lies about fsync.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mrlm_cli.errors import CheckpointError
from mrlm_cli.training import durable

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
# A checkpoint that is being replaced by one of the same step bears the suffix until the new one is in place.
_NAME = re.compile(r"step-(\d{6,})(\.replaced)?")


def name(step: int) -> str:
    """The directory name of a step's checkpoint."""
    return f"step-{step:06d}"


def step_of(directory: Path) -> int:
    """The step in a checkpoint's directory name. Raises CheckpointError for any other name."""
    match = _NAME.fullmatch(directory.name)
    if match is None:
        raise CheckpointError(f"{directory} is not a checkpoint: its name is not of the form step-000040")
    return int(match[1])


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


def verify(directory: Path) -> None:
    """Return if the checkpoint is whole. Raises CheckpointError naming the first file that is not as it was written."""
    files = _manifest(directory)["files"]
    for relative, entry in files.items():
        path = directory / relative
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                raise CheckpointError(f"{path} is broken: {size} bytes instead of {entry['bytes']}")
            if _sha256(path) != entry["sha256"]:
                raise CheckpointError(f"{path} is broken: its content is not what was written (sha256 differs)")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def newest_whole(parent: Path, warn: Callable[[str], None]) -> Path | None:
    """The whole checkpoint of the highest step, or None; each broken one on the way is told to `warn`."""
    for directory in sorted(_checkpoints(parent), key=lambda path: (-step_of(path), path.name)):
        try:
            verify(directory)
        except CheckpointError as error:
            warn(f"checkpoint {directory.name} is left out: {error}")
        else:
            return directory
    return None


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
    reached = sorted((path for path in _checkpoints(parent) if step_of(path) <= newest), key=step_of)
    with _disk(f"old checkpoints in {parent} could not be removed"):
        for path in reached[: max(0, len(reached) - keep)]:
            if path.name not in targets.values():
                _discard(path)


def sweep(parent: Path) -> None:
    """Remove what killed writers left behind; only for the process that holds the run's lock."""
    with _disk(f"stale files in {parent} could not be removed"):
        durable.sweep(parent)
        for path in _checkpoints(parent):
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


def _checkpoints(parent: Path) -> list[Path]:
    return [path for path in parent.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]


def _discard(path: Path) -> None:
    # Renamed first: a kill while files are being deleted must not leave something that looks like a checkpoint.
    aside = durable.temporary(path)
    os.rename(path, aside)
    durable.remove(aside)


def _digests(directory: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in files
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory} is not a whole checkpoint: it has no {MANIFEST}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is broken: not JSON") from error
    if not isinstance(found, dict) or found.get("version") != MANIFEST_VERSION:
        raise CheckpointError(f"{path} is not a manifest of version {MANIFEST_VERSION}")
    files = found.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in files.values()
    ):
        raise CheckpointError(f"{path} is broken: it does not list bytes and sha256 of every file")
    return found

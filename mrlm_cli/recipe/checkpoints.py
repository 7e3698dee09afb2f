"""Checkpoints as they are found on disk: which one a run means, and whether it is whole. Reads alone, without torch.

Whole means that the manifest is there and every file it names has its size and sha256. Files it does not name are
ignored. Not covered: a disk that lies about fsync.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mrlm_cli.errors import CheckpointError

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
# A checkpoint that is being replaced by one of the same step bears the suffix until the new one is in place.
NAME = re.compile(r"step-(\d{6,})(\.replaced)?")


def name(step: int) -> str:
    """The directory name of a step's checkpoint."""
    return f"step-{step:06d}"


def step_of(directory: Path) -> int:
    """The step in a checkpoint's directory name. Raises CheckpointError for any other name."""
    match = NAME.fullmatch(directory.name)
    if match is None:
        raise CheckpointError(f"{directory} is not a checkpoint: its name is not of the form step-000040")
    return int(match[1])


def verify(directory: Path) -> None:
    """Return if the checkpoint is whole. Raises CheckpointError naming the first file that is not as it was written."""
    files = _manifest(directory)["files"]
    for relative, entry in files.items():
        path = directory / relative
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                raise CheckpointError(f"{path} is broken: {size} bytes instead of {entry['bytes']}")
            if sha256(path) != entry["sha256"]:
                raise CheckpointError(f"{path} is broken: its content is not what was written (sha256 differs)")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def newest_whole(parent: Path, warn: Callable[[str], None]) -> Path | None:
    """The whole checkpoint of the highest step, or None; each broken one on the way is told to `warn`."""
    for directory in below(parent):
        try:
            verify(directory)
        except CheckpointError as error:
            warn(f"checkpoint {directory.name} is left out: {error}")
        else:
            return directory
    return None


def below(parent: Path) -> list[Path]:
    """Every checkpoint below `parent`, whole or not, the highest step first."""
    there = [path for path in parent.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(there, key=lambda path: (-step_of(path), path.name))


def trained(parent: Path) -> list[Path]:
    """Those `below` that hold a step done, so that losing them loses training."""
    return [path for path in below(parent) if step_of(path) > 0]


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
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

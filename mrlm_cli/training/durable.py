"""Files that are whole or absent, whatever kills the process: written beside, fsynced, renamed, folder fsynced."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp-"
STALE_SECONDS = 3600.0  # no whole file here takes longer to write; a younger temporary may belong to a living process


def temporary(target: Path) -> Path:
    """A fresh sibling's path to build `target` in; `sweep` knows it by its name."""
    return target.with_name(f"{TEMPORARY}{target.name}-{uuid.uuid4().hex[:12]}")


def sync(path: Path) -> None:
    """Flush a file or a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, and `folder` itself, children first.

    A file becomes readable to whom its folder is: safetensors makes its files private.
    """
    for place, _, names in os.walk(folder, topdown=False):
        readers = os.stat(place).st_mode & 0o444
        for name in names:
            path = Path(place, name)
            mode = stat.S_IMODE(path.stat().st_mode)
            if mode | readers != mode:
                path.chmod(mode | readers)
            sync(path)
        sync(Path(place))


def write_whole(path: Path, data: bytes) -> None:
    """Make or replace the file `path` in one instant. Raises OSError, with the old content in place."""
    beside = temporary(path)
    try:
        with beside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        remove(beside)
        raise
    sync(path.parent)


def point(link: Path, target: str) -> None:
    """Make or replace the symbolic link `link` -> `target` (relative to the link's folder) in one instant."""
    beside = temporary(link)
    try:
        beside.symlink_to(target)
        os.replace(beside, link)
    except BaseException:
        remove(beside)
        raise
    sync(link.parent)


def remove(path: Path) -> None:
    """Delete a file, a link or a whole folder, as far as it can be deleted; what stays is swept at the next start."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # called while another error is on its way, which must not be hidden by this one


def sweep(folder: Path, older_than: float = 0.0, target: str | None = None) -> None:
    """Delete temporaries in `folder`, of the given target's name only if one is given.

    `older_than` spares those touched in the last so many seconds, where another process may be writing.
    """
    name = re.compile(f"{re.escape(TEMPORARY)}{'.+' if target is None else re.escape(target)}-[0-9a-f]{{12}}")
    limit = time.time() - older_than
    for path in folder.glob(f"{TEMPORARY}*"):
        if not name.fullmatch(path.name):
            continue
        try:
            fresh = older_than > 0 and path.lstat().st_mtime > limit
        except (FileNotFoundError, NotADirectoryError):
            continue  # its owner has just renamed it
        if not fresh:
            remove(path)


def json_line(row: Mapping[str, Any]) -> bytes:
    """One line of JSON. Raises ValueError for NaN and infinity."""
    # What UTF-8 cannot hold is a lone surrogate, and its backslash form is the one that JSON reads back.
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"


def json_text(data: Any) -> bytes:
    """Indented JSON. Raises ValueError for NaN and infinity."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, indent=2).encode("utf-8", "backslashreplace") + b"\n"


def append(path: Path, line: bytes) -> None:
    """Add one whole line to a file and flush it to the disk.

    Raises OSError; the file then ends where it ended before, unless even that is refused (then the last line is torn,
    which every reader here passes over).
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(descriptor, line[written:])
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file without their newline; an unfinished last line is left out, a missing file has none."""
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return []
    return data.split(b"\n")[:-1]

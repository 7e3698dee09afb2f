"""The Python that runs sandboxed programs: this one's, or the system's where other users cannot reach this one."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

_SYSTEM = ("/usr/bin/python3", "/usr/local/bin/python3")
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")


@dataclass(frozen=True, slots=True)
class Interpreter:
    """An executable and the folders that it reads. Third-party packages among them are to be hidden."""

    executable: Path
    folders: tuple[Path, ...]
    packages: tuple[Path, ...]


def candidates() -> list[Interpreter]:
    """The interpreters to try, in order: the one that runs this (outside any virtual environment), the system's."""
    own = Path(getattr(sys, "_base_executable", "") or sys.executable)
    found = {path.resolve(): None for path in (own, *map(Path, _SYSTEM)) if path.exists()}
    return [_interpreter(path) for path in found]


def _interpreter(executable: Path) -> Interpreter:
    libraries = [executable.parent.parent / name for name in ("lib", "lib64")]
    shared = [Path(name) for name in _LIBRARIES]
    folders = [folder for folder in dict.fromkeys([*libraries, *shared]) if folder.is_dir()]
    packages = [
        packages
        for folder in folders
        if not folder.is_symlink()
        for pattern in ("python3*/site-packages", "python3*/dist-packages")
        for packages in sorted(folder.glob(pattern))
    ]
    return Interpreter(executable, tuple(folders), tuple(packages))


def links(interpreter: Interpreter) -> list[tuple[Path, str]]:
    """Folders that are symbolic links (/lib on most systems), with what they point to."""
    return [(folder, os.readlink(folder)) for folder in interpreter.folders if folder.is_symlink()]

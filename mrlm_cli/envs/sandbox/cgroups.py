"""Control groups that bound memory and number of processes of a whole sandbox; version 1 or 2, whichever is writable.

A group is made once and used again: making and removing one costs milliseconds of every run. Names carry the number of
the process that made them, so that a later process can sweep what a killed one left.
"""

from __future__ import annotations

import atexit
import itertools
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from mrlm_cli.envs.sandbox.records import Limits
from mrlm_cli.errors import SandboxFailure

EMPTY_SECONDS = 5.0  # for killed processes to leave a group
SWEEP_SECONDS = 1.0  # for those of a killed owner
_PREFIX = "mrlm-sandbox-"
_OWN = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")
_numbers = itertools.count()  # of groups made by this process


@dataclass(slots=True)
class Group:
    """One sandbox's control group: a folder of version 2, or one folder for each controller of version 1."""

    memory: Path
    pids: Path
    _set: tuple[int, int] | None = field(default=None)
    _kills: int = 0

    @property
    def entrances(self) -> tuple[Path, ...]:
        """Files that a process writes "0" into to enter."""
        return tuple(dict.fromkeys((self.memory / "cgroup.procs", self.pids / "cgroup.procs")))

    def limit(self, limits: Limits) -> None:
        """Set the bounds, before anyone enters. Raises OSError where the kernel refuses."""
        wanted = limits.memory_mib * 2**20, limits.processes + 3  # bwrap's two, and the shell that becomes it
        if wanted != self._set:
            (self.pids / "pids.max").write_text(str(wanted[1]))
            if (self.memory / "memory.max").exists():
                (self.memory / "memory.max").write_text(str(wanted[0]))
                _if_there(self.memory / "memory.swap.max", "0")
                _if_there(self.memory / "memory.oom.group", "1")
            else:
                _if_there(self.memory / "memory.memsw.limit_in_bytes", "-1")  # must not lie below the other
                (self.memory / "memory.limit_in_bytes").write_text(str(wanted[0]))
                _if_there(self.memory / "memory.memsw.limit_in_bytes", str(wanted[0]))
            self._set = wanted
        self._kills = self._count()

    def out_of_memory(self) -> bool:
        """Whether the kernel killed a member for memory since `limit`."""
        return self._count() > self._kills

    def clear(self) -> None:
        """Kill whoever is inside. Raises SandboxFailure if somebody stays."""
        until = time.monotonic() + EMPTY_SECONDS
        while members := self._members():
            for member in members:
                with suppress(ProcessLookupError):
                    os.kill(member, signal.SIGKILL)
            if time.monotonic() > until:
                raise SandboxFailure(f"processes {sorted(members)} of a sandbox do not die")
            time.sleep(0.001)

    def remove(self) -> None:
        """Give the folders back; they must be empty of processes."""
        for folder in dict.fromkeys((self.memory, self.pids)):
            with suppress(OSError):  # the machine may be shutting down; the next process sweeps
                folder.rmdir()

    def _members(self) -> set[int]:
        return {int(line) for entrance in self.entrances for line in entrance.read_text().split()}

    def _count(self) -> int:
        for name in ("memory.events", "memory.oom_control"):
            with suppress(OSError):
                for line in (self.memory / name).read_text().splitlines():
                    if line.startswith("oom_kill "):
                        return int(line.split()[1])
        return 0


class Groups:
    """A pool of groups under one folder for each controller."""

    def __init__(self, memory: Path, pids: Path) -> None:
        self._parents = memory, pids
        self._free: list[Group] = []
        self._all: list[Group] = []
        self._lock = Lock()
        self.sweep()
        atexit.register(self.remove)

    def take(self) -> Group:
        """A group that nobody else uses. Raises OSError where it cannot be made."""
        with self._lock:
            if self._free:
                return self._free.pop()
            name = f"{_PREFIX}{os.getpid()}-{next(_numbers)}"
            group = Group(self._parents[0] / name, self._parents[1] / name)
            for folder in dict.fromkeys((group.memory, group.pids)):
                folder.mkdir()
            self._all.append(group)
            return group

    def give(self, group: Group) -> None:
        """Back into the pool; it must be clear."""
        with self._lock:
            self._free.append(group)

    def remove(self) -> None:
        """End of the process."""
        for group in self._all:
            group.remove()

    def sweep(self) -> None:
        """Remove the groups of processes that are gone. What they held dies with them, a moment later."""
        until = time.monotonic() + SWEEP_SECONDS
        while left := [folder for folder in self._orphans() if not _removed(folder)]:
            if time.monotonic() > until:
                return  # in use after all; the next process that makes groups here tries again
            time.sleep(0.01 * len(left))

    def _orphans(self) -> list[Path]:
        folders = [folder for parent in dict.fromkeys(self._parents) for folder in parent.glob(f"{_PREFIX}*-*")]
        owners = [folder.name.removeprefix(_PREFIX).partition("-")[0] for folder in folders]
        return [
            folder
            for folder, owner in zip(folders, owners, strict=True)
            if owner.isdigit() and not Path("/proc", owner).exists()
        ]


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except FileNotFoundError:
        pass  # swept by another at this moment
    except OSError:
        return False
    return True


def find(root: Path = _ROOT, own: Path = _OWN) -> Groups:
    """The nearest place at or above this process's own groups where groups can be made.

    Raises OSError that says why there is none.
    """
    places = {
        controller: line.split(":", 2)[2].lstrip("/")
        for line in own.read_text().splitlines()
        for controller in line.split(":", 2)[1].split(",")
    }
    if "memory" in places and "pids" in places:
        return Groups(_version_1(root / "memory", places["memory"]), _version_1(root / "pids", places["pids"]))
    if "" not in places:
        raise OSError("this process is in no control group with the controllers memory and pids")
    return Groups(*[_version_2(root, places[""])] * 2)


def _version_1(mount: Path, place: str) -> Path:
    # A container may see its own group at the mount's root under a path that exists only outside.
    folder = mount / place if (mount / place).is_dir() else mount
    if not os.access(folder, os.W_OK):
        raise OSError(f"{folder} is not writable")
    return folder


def _version_2(root: Path, place: str) -> Path:
    """A folder whose children have both controllers. Only a group without processes of its own may hand them on."""
    inside = root / place if (root / place).is_dir() else root
    for folder in (inside, *inside.parents):
        handed_on = folder / "cgroup.subtree_control"
        with suppress(OSError):
            if not {"memory", "pids"} <= set(handed_on.read_text().split()):
                handed_on.write_text("+memory +pids")
            if {"memory", "pids"} <= set(handed_on.read_text().split()) and os.access(folder, os.W_OK):
                return folder
        if folder == root:
            break
    raise OSError(f"no control group from {inside} up to {root} is writable and hands on memory and pids")


def _if_there(path: Path, text: str) -> None:
    if path.exists():
        path.write_text(text)

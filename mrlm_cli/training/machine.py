"""What a run ran on: versions, commit, processor, memory, threads. And the fixed rule for the number of threads."""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mrlm_cli import __version__

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "pydantic", "numpy", "rich")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc
_CGROUPS = Path("/sys/fs/cgroup")


def default_threads() -> int:
    """CPUs that this process may use: its affinity, limited by the CPU quota of its control groups, rounded down.

    A fixed rule of the machine's settings, never of its load: other thread counts give other bits.
    """
    quota = _cpu_quota(Path("/proc/self/cgroup"), _CGROUPS)
    allowed = _affinity()
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def keep_memory() -> None:
    """Tell the C library to keep freed memory for the next allocation instead of giving it back to the kernel.

    A training step frees and asks again for the same hundreds of megabytes; each time, the kernel would clear every
    page anew, which costs about a fifth of a step. Only glibc has the switch; elsewhere nothing changes.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)


def describe() -> dict[str, Any]:
    """What machine.json holds, JSON-able. Imports torch."""
    import torch

    from mrlm_cli.kernels import native

    return {
        "versions": {"mrlm": __version__, "python": platform.python_version()}
        | {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpus_allowed": _affinity(),
        "cpu_quota": _cpu_quota(Path("/proc/self/cgroup"), _CGROUPS),
        "memory_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "native": native.state(),
        "command": shlex.join(sys.argv),
    }


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_quota(membership: Path, root: Path) -> float | None:
    """CPUs granted by the tightest quota from this process's control group up to the root; None if unlimited."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None  # not Linux
    quotas = []
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers == "":  # version 2
            base, read = root, _quota_v2
        elif "cpu" in controllers.split(","):
            base, read = root / controllers, _quota_v1
        else:
            continue
        inside = base / place.lstrip("/")
        # A container may see its own group at the mount's root under a path that exists only outside.
        for folder in (inside, *inside.parents):
            quota = read(folder)
            if quota is not None:
                quotas.append(quota)
            if folder == base:
                break
    return min(quotas, default=None)


def _quota_v2(folder: Path) -> float | None:
    fields = _fields(folder / "cpu.max")
    return int(fields[0]) / int(fields[1]) if len(fields) == 2 and fields[0] != "max" else None


def _quota_v1(folder: Path) -> float | None:
    quota, period = _fields(folder / "cpu.cfs_quota_us"), _fields(folder / "cpu.cfs_period_us")
    return int(quota[0]) / int(period[0]) if quota and period and int(quota[0]) > 0 else None


def _fields(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    """The commit of the checkout that this very file is tracked in, with "+changes" if tracked files differ from it."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None  # no git on this machine, or one that hangs: the commit stays unknown
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if commit and changes else commit

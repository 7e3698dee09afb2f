"""Programs that attack the sandbox, and programs that cheat its graders. Standard library alone: other users run it."""

from __future__ import annotations

import re
from pathlib import Path


def _programs(name: str) -> dict[str, str]:
    """name -> text of every program in a file of this folder."""
    parts = re.split(r"^### (\w+)\n", (Path(__file__).parent / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


HOSTILE = _programs("hostile_programs.txt")
CHEATS = _programs("hostile_cheats.txt")

REFUSED = {
    "NAMESPACE", "CLONE3", "MOUNT", "URING", "BPF", "PERF", "USERFAULT", "KEY", "TRACE", "HANDLE", "X32", "MODULE",
    "HOSTNAME", "CLOCK", "SHARED",
}  # fmt: skip
"""What a program prints about a kernel interface, before the results of its calls: none may have succeeded."""
NEVER = ("canary-secret", "WROTE", "ROOT", "TYPED", "MEMFD", "LIMIT", "mrlm-environment-secret")

SLOW = {
    "fork_bomb", "threads", "exec_storm", "memory_in_children", "fill_disk", "many_files", "deaf", "daemon",
    "daemon_closing", "close_pipe_and_stay", "listen", "stop_itself", "pipe_flood", "stderr_flood", "sleeper",
    "walk_everything", "fork_and_exit", "memory_big_power", "memory_mapped",
}  # fmt: skip
"""Those that are ended by a clock, or take long."""

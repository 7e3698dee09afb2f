"""Finds the strongest mechanism that really confines here, by running a program that tries to get out."""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import suppress
from functools import cache

from mrlm_cli.envs.sandbox import interpreter
from mrlm_cli.envs.sandbox.box import Sandbox
from mrlm_cli.envs.sandbox.mechanisms import STRONGEST_FIRST, VARIABLES, Mechanism, Unsafe
from mrlm_cli.envs.sandbox.records import Call, Job, Limits
from mrlm_cli.errors import SandboxFailure, UserError

_LIMITS = Limits(wall_seconds=5.0, cpu_seconds=2, test_seconds=1.0, memory_mib=128, processes=8, disk_mib=2)
_PROGRAM = """
def refused(act, *arguments):
    try:
        act(*arguments)
    except (OSError, MemoryError):
        return True
    return False

def variables():
    import posix
    return sorted(name.decode() for name in posix.environ)

def reads(path):
    return not refused(open, path)

def network():
    import _socket
    return not refused(_socket.socket)

def signals(process):
    import posix
    return not refused(posix.kill, process, 0)

def children(most):
    import _signal, posix
    for count in range(most):
        try:
            if posix.fork() == 0:
                while True:
                    _signal.pause()
        except OSError:
            return count
    return most

def memory(mebibytes):
    return not refused(bytearray, mebibytes << 20)

def disk(mebibytes):
    try:
        with open("/tmp/probe", "wb", buffering=0) as file:
            return sum(file.write(b"x" * (1 << 20)) for _ in range(mebibytes))
    except OSError:
        return 0

def writes(path):
    return not refused(open, path, "w")

def probe(name, *arguments):
    return globals()[name](*arguments)
"""


@cache
def choose(allow_unsafe: bool = False) -> Sandbox:
    """The strongest mechanism that works here, looked for once in a process.

    Raises UserError with every mechanism's reason if there is none and `allow_unsafe` is not set.
    """
    reasons = []
    for kind in STRONGEST_FIRST:
        found = attempt(kind)
        if isinstance(found, Sandbox):
            return found
        reasons.append(f"{kind.name}: {found}")
    if allow_unsafe:
        return Sandbox(Unsafe(interpreter.candidates()[0]))
    raise UserError(
        "no sandbox works here, and untrusted programs will not run without one; install bubblewrap, or set "
        "sandbox.allow_unsafe: true if you trust them as yourself (" + "; ".join(reasons) + ")"
    )


@cache
def attempt(kind: type[Mechanism]) -> Sandbox | str:
    """A sandbox of this mechanism, with the first interpreter that it can run, or why there is none."""
    if sys.platform != "linux":
        return "this is not Linux"
    reason = "there is no interpreter"
    for python in interpreter.candidates():
        try:
            sandbox = Sandbox(kind(python))
            leaks = _leaks(sandbox)
        except (OSError, SandboxFailure) as error:
            reason = str(error)
            continue
        if not leaks:
            sandbox.failures = 0
            return sandbox
        reason = f"it does not hold: {', '.join(leaks)}"
    return reason


def _leaks(sandbox: Sandbox) -> list[str]:
    """What a program in the sandbox could do that it must not. Raises SandboxFailure."""
    descriptor, secret = tempfile.mkstemp(prefix="mrlm-probe-", dir="/tmp")  # TMPDIR may be closed to other users
    try:
        os.write(descriptor, b"secret")
        os.fchmod(descriptor, 0o644)  # Landlock and mounts must hide it, not its mode
        os.close(descriptor)
        return _found(sandbox, secret)
    finally:
        with suppress(FileNotFoundError):  # a program that could delete it was caught above
            os.unlink(secret)


def _found(sandbox: Sandbox, secret: str) -> list[str]:
    checks = {
        "it sees the environment": (("variables",), lambda seen: set(seen) <= {*VARIABLES, "PWD", "LC_CTYPE"}),
        "it reads files": (("reads", secret), lambda seen: seen is False),
        "it reads /etc/passwd": (("reads", "/etc/passwd"), lambda seen: seen is False),
        "it reads /proc": (("reads", "/proc/1/status"), lambda seen: seen is False),
        "it reaches the network": (("network",), lambda seen: seen is False),
        "it signals processes": (("signals", os.getpid()), lambda seen: seen is False),
        "it takes memory without bound": (("memory", 4 * _LIMITS.memory_mib), lambda seen: seen is False),
        "it fills the disk": (("disk", 4 * _LIMITS.disk_mib), lambda seen: seen <= _LIMITS.disk_mib * 2**20),
        "it writes to the system": (("writes", "/usr/lib/mrlm-probe"), lambda seen: seen is False),
        "it writes to /": (("writes", "/mrlm-probe"), lambda seen: seen is False),
        "it starts processes without bound": (("children", 64), lambda seen: seen <= _LIMITS.processes + 3),
    }
    job = Job(_PROGRAM, "calls", tuple(Call(arguments) for arguments, _ in checks.values()), entry="probe")
    results = sandbox.run(job, _LIMITS)
    return [
        what if result.kind == "value" else f"{what}? ({result.kind} {result.text})"
        for (what, (_, holds)), result in zip(checks.items(), results, strict=True)
        if result.kind != "value" or not holds(result.value)
    ]

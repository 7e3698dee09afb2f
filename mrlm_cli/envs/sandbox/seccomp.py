"""The list of allowed system calls as a classic BPF program, for the kernel's seccomp filter.

No compiler and no library: the program is a table of eight-byte instructions. See seccomp(2) and
Documentation/userspace-api/seccomp_filter.rst of Linux.
"""

from __future__ import annotations

import errno
import platform
import struct
import sys

from mrlm_cli.envs.sandbox import syscalls

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_REFUSE, _UNKNOWN = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
_X32 = 0x40000000  # calls of the x32 interface carry this bit
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_NAMESPACES = 0x7E020000  # CLONE_NEW*
_THREAD = 0x00010000  # CLONE_THREAD
_IOCTLS = (0x5401, 0x5413, 0x5421, 0x541B, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONBIO, FIONREAD, FIONCLEX, FIOCLEX
_NOT_A_STREAM = 0xE  # bits of a socket's type: half of a pair of datagram sockets could write to any socket's name
_TRUNCATE, _WRITE, _READ_AND_WRITE = 0x200, 0x1, 0x2  # bits of how a file is opened, alike on both machines
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG: a program alone must not outlive the one who started it
_OWNERS = (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: they make the kernel send signals to others


def supported() -> bool:
    """Whether the table of system calls knows this machine."""
    return sys.platform == "linux" and platform.machine() in _ARCHITECTURES


def program(*, alone: bool) -> bytes:
    """The filter. `alone`: no namespaces hide other processes and files, so children, signals and changes of the mode,
    the times and the length of what has a name are refused as well."""
    machine = platform.machine()
    filtered = syscalls.numbers(syscalls.FILTERED, machine)
    allowed = syscalls.numbers(syscalls.ALWAYS, machine)
    if not alone:
        allowed |= syscalls.numbers(syscalls.IN_NAMESPACES, machine)
    code = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_IF_EQUAL, 1, 0, _ARCHITECTURES[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_IF_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
    ]
    if alone:
        own = allowed.pop("prctl")
        opening = [(allowed.pop(name), place) for name, place in (("open", 1), ("openat", 2)) if name in allowed]
    for number in sorted(allowed.values()):
        code += [(_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    needs_thread = [(_IF_ANY_BIT, 1, 0, _THREAD), (_RETURN, 0, 0, _REFUSE)] if alone else []
    not_spaces = [(_IF_ANY_BIT, 0, 1, _NAMESPACES), (_RETURN, 0, 0, _REFUSE)]
    if alone:
        code += _where(own, 0, [*_either((_DEATH_SIGNAL,), _REFUSE), (_RETURN, 0, 0, _ALLOW)])
        for number, place in opening:
            code += _where(number, place, _OPENING)
    code += _where(filtered["clone"], 0, [*not_spaces, *needs_thread, (_RETURN, 0, 0, _ALLOW)])
    # Its flags lie behind a pointer, which a filter cannot follow; the C library falls back to clone.
    code += [(_IF_EQUAL, 0, 1, filtered["clone3"]), (_RETURN, 0, 0, _UNKNOWN)]
    code += _where(filtered["ioctl"], 1, [*_either(_IOCTLS, _ALLOW), (_RETURN, 0, 0, _REFUSE)])
    code += _where(filtered["fcntl"], 1, [*_either(_OWNERS, _REFUSE), (_RETURN, 0, 0, _ALLOW)])
    refuse_others = [(_IF_ANY_BIT, 0, 1, _NOT_A_STREAM), (_RETURN, 0, 0, _REFUSE)]
    code += _where(filtered["socketpair"], 1, [*refuse_others, (_RETURN, 0, 0, _ALLOW)])
    for name in ("prlimit64", "sched_getaffinity", "sched_setaffinity"):  # of this very process only
        code += _where(filtered[name], 0, [*_either((0,), _ALLOW), (_RETURN, 0, 0, _REFUSE)])
    code.append((_RETURN, 0, 0, _REFUSE))
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


# Before its third version Landlock lets what is opened for reading alone, or for neither, be cut to nothing as well.
_OPENING = [
    (_IF_ANY_BIT, 1, 0, _TRUNCATE),
    (_RETURN, 0, 0, _ALLOW),
    (_IF_ANY_BIT, 1, 0, _WRITE),
    (_IF_ANY_BIT, 1, 2, _READ_AND_WRITE),
    (_IF_ANY_BIT, 1, 0, _READ_AND_WRITE),
    (_RETURN, 0, 0, _ALLOW),
    (_RETURN, 0, 0, _REFUSE),
]


def _where(number: int, argument: int, body: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """`body`, which must return, for this system call with the low half of an argument loaded."""
    load = (_LOAD, 0, 0, _ARGUMENTS + 8 * argument)  # both machines are little-endian
    return [(_IF_EQUAL, 0, len(body) + 1, number), load, *body]


def _either(values: tuple[int, ...], verdict: int) -> list[tuple[int, int, int, int]]:
    return [step for value in values for step in ((_IF_EQUAL, 0, 1, value), (_RETURN, 0, 0, verdict))]

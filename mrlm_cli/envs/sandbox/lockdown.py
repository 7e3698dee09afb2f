"""The program's side of the unprivileged mechanism: this interpreter gives up its own rights, for good.

The source of this file is run inside by `runner`, so it imports nothing of ours. Landlock: landlock(7) and
Documentation/userspace-api/landlock.rst of Linux.
"""

import ctypes
import posix
import resource

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER, SET_DUMPABLE, SET_DEATH_SIGNAL, KILL = 38, 22, 2, 4, 1, 9
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # rights on files by version of the interface; 16 from the fifth


class Rules(ctypes.Structure):
    """struct landlock_ruleset_attr."""

    _fields_ = [("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class Beneath(ctypes.Structure):
    """struct landlock_path_beneath_attr."""

    _pack_ = 1
    _fields_ = [("rights", ctypes.c_uint64), ("parent", ctypes.c_int32)]


class Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long


def checked(result, what):
    """The result of a call that must not fail."""
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {posix.strerror(ctypes.get_errno())}")
    return result


def lock(request, rlimits):
    """Bound this process, then give up the file system but for `request["read"]`, then system calls but the filter's.

    Raises OSError where the kernel refuses any of it.
    """
    for name, value in rlimits:
        resource.setrlimit(getattr(resource, name), (value, value))
    number = ctypes.c_long
    checked(LIBC.prctl(NO_NEW_PRIVILEGES, number(1), number(0), number(0), number(0)), "no_new_privs")
    checked(LIBC.prctl(SET_DUMPABLE, number(0), number(0), number(0), number(0)), "dumpable")
    # Whoever started this may be killed before it can end this; the filter keeps the program from taking it back.
    checked(LIBC.prctl(SET_DEATH_SIGNAL, number(KILL), number(0), number(0), number(0)), "death signal")
    version = checked(LIBC.syscall(number(CREATE_RULESET), None, number(0), number(1)), "Landlock")
    rules = Rules((1 << RIGHTS.get(version, 16)) - 1, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = checked(LIBC.syscall(number(CREATE_RULESET), ctypes.byref(rules), number(size), number(0)), "Landlock")
    for path, folder, writable in request["read"]:
        parent = posix.open(path, posix.O_PATH | posix.O_CLOEXEC)
        rights = READ_FILE | (EXECUTE if not writable else WRITE_FILE) | (READ_DIR if folder else 0)
        rule = Beneath(rights, parent)
        checked(LIBC.syscall(number(ADD_RULE), number(ruleset), number(1), ctypes.byref(rule), number(0)), path)
        posix.close(parent)
    checked(LIBC.syscall(number(RESTRICT_SELF), number(ruleset), number(0)), "Landlock")
    posix.close(ruleset)
    program = Program(len(request["filter"]) // 8, request["filter"])
    checked(LIBC.prctl(SET_SECCOMP, number(FILTER), ctypes.byref(program), number(0), number(0)), "seccomp")

"""The ways to confine a process, strongest first, and the way without any."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from mrlm_cli.envs.sandbox import cgroups, interpreter, seccomp
from mrlm_cli.envs.sandbox.interpreter import Interpreter
from mrlm_cli.envs.sandbox.records import Limits

VARIABLES = {"PATH": "/usr/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
"""All that a program finds in its environment."""
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_FIRST_USER = 1_000_000_000  # user numbers from here on, by process: nobody else has them
_USERS = 64  # of one process
END_SECONDS = 5.0  # for bubblewrap to reap what was killed


@dataclass(frozen=True, slots=True)
class Started:
    """A process under way. `end` kills it with everything that it started, and may raise SandboxFailure."""

    process: subprocess.Popen[bytes]
    end: Callable[[], None]
    out_of_memory: Callable[[], bool] = lambda: False


class Mechanism(ABC):
    """Starts `python -c …` confined. Making an instance raises OSError that says what is missing here."""

    name: ClassVar[str]

    def __init__(self, python: Interpreter) -> None:
        self.python = python

    @abstractmethod
    def start(self, arguments: Sequence[str], descriptors: Sequence[int], limits: Limits) -> Started:
        """Start the interpreter with `arguments`; it inherits `descriptors`, the last one as its standard error.

        Raises OSError.
        """

    def lockdown(self) -> Mapping[str, Any] | None:
        """What the interpreter is told to give up by itself; None where it is confined from outside."""
        return None

    def sweep(self) -> None:  # noqa: B027  (most leave nothing behind)
        """Remove what sandboxes of processes that are gone left behind."""

    def _popen(self, command: Sequence[str], descriptors: Sequence[int], **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=descriptors[-1],
            pass_fds=descriptors,
            env=VARIABLES,
            cwd="/",
            start_new_session=True,
            **options,
        )


class Bubblewrap(Mechanism):
    """bubblewrap + seccomp + rlimits: namespaces without control groups."""

    name = "bubblewrap + seccomp + rlimits"

    def __init__(self, python: Interpreter) -> None:
        super().__init__(python)
        found = shutil.which("bwrap")
        if found is None:
            raise OSError("bubblewrap (bwrap) is not installed")
        if not seccomp.supported():
            raise OSError("no table of system calls for this machine")
        self._bwrap = found
        self._filter = seccomp.program(alone=False)
        self._users = itertools.count()

    def start(self, arguments: Sequence[str], descriptors: Sequence[int], limits: Limits) -> Started:
        """See Mechanism. Root starts it under a user number of its own."""
        options: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = _FIRST_USER + os.getpid() * _USERS + next(self._users) % _USERS
            options = {"user": user, "group": user, "extra_groups": []}
        return self._started((), arguments, descriptors, limits, **options)

    def _started(
        self,
        before: Sequence[str],
        arguments: Sequence[str],
        descriptors: Sequence[int],
        limits: Limits,
        **options: Any,
    ) -> Started:
        reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        with ExitStack() as stack:
            stack.callback(os.close, writing)
            rules = memory_file(self._filter)
            stack.callback(os.close, rules)
            told = ["--seccomp", str(rules), "--info-fd", str(writing), *self._view(limits.disk_mib), "--"]
            command = [*before, self._bwrap, *told, str(self.python.executable), *arguments]
            process = self._popen(command, [rules, writing, *descriptors], **options)
        return Started(process, lambda: _end_namespace(process, reading))

    def _view(self, disk_mib: int) -> list[str]:
        """What the program sees: the interpreter and shared libraries, three devices, an empty /tmp."""
        view = ["--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--hostname", "sandbox"]
        view += ["--uid", "65534", "--gid", "65534", "--cap-drop", "ALL"]
        for link, target in interpreter.links(self.python):
            view += ["--symlink", target, str(link)]
        for folder in self.python.folders:
            if not folder.is_symlink():
                view += ["--ro-bind", str(folder), str(folder)]
        for packages in self.python.packages:
            view += ["--size", "4096", "--tmpfs", str(packages), "--remount-ro", str(packages)]
        view += ["--ro-bind", str(self.python.executable), str(self.python.executable)]
        view += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
        for device in _DEVICES:
            view += ["--dev-bind", device, device]
        view += ["--size", str(disk_mib * 2**20), "--tmpfs", "/tmp", "--chdir", "/tmp"]
        return [*view, "--remount-ro", "/"]  # bubblewrap's own root would be writable, and without a bound


class ControlledBubblewrap(Bubblewrap):
    """bubblewrap + cgroup + seccomp: memory and processes are bounded for all of the sandbox together."""

    name = "bubblewrap + cgroup + seccomp"

    def __init__(self, python: Interpreter) -> None:
        super().__init__(python)
        self._groups = _groups()

    def start(self, arguments: Sequence[str], descriptors: Sequence[int], limits: Limits) -> Started:
        """See Mechanism."""
        group = self._groups.take()
        enter = " && ".join(f"echo 0 >{shlex.quote(str(entrance))}" for entrance in group.entrances)
        before = ("/bin/sh", "-c", f'{enter} && exec "$@"', "sh")
        try:
            group.limit(limits)
            started = self._started(before, arguments, descriptors, limits)
        except BaseException:
            self._groups.give(group)
            raise

        def end() -> None:
            started.end()
            group.clear()
            self._groups.give(group)

        return Started(started.process, end, group.out_of_memory)

    def sweep(self) -> None:
        """Control groups of killed workers."""
        self._groups.sweep()


class Landlocked(Mechanism):
    """Landlock + seccomp + rlimits: one process that gives up its own rights; it can start no other."""

    name = "Landlock + seccomp + rlimits"

    def __init__(self, python: Interpreter) -> None:
        super().__init__(python)
        if not seccomp.supported():
            raise OSError("no table of system calls for this machine")
        self._users = itertools.count()

    def lockdown(self) -> Mapping[str, Any]:
        """What `lockdown.lock` reads, and its source."""
        source = Path(__file__).with_name("lockdown.py").read_text(encoding="utf-8")
        read = [(str(folder), True, False) for folder in self.python.folders]
        files = [str(self.python.executable), "/etc/ld.so.cache", *_DEVICES]
        read += [(file, False, file == "/dev/null") for file in files if os.path.exists(file)]
        return {"source": source, "filter": seccomp.program(alone=True), "read": read}

    def start(self, arguments: Sequence[str], descriptors: Sequence[int], limits: Limits) -> Started:
        """See Mechanism. Root starts it under a user number of its own."""
        options: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = _FIRST_USER + os.getpid() * _USERS + next(self._users) % _USERS
            options = {"user": user, "group": user, "extra_groups": []}
        process = self._popen([str(self.python.executable), *arguments], descriptors, **options)
        return Started(process, lambda: _kill(process))


class Unsafe(Mechanism):
    """No confinement: rlimits, a deadline, and a kill of the process group. Only for programs that you trust."""

    name = "NONE (allow_unsafe): programs can do whatever you can do"

    def start(self, arguments: Sequence[str], descriptors: Sequence[int], limits: Limits) -> Started:
        """See Mechanism."""
        process = self._popen([str(self.python.executable), *arguments], descriptors)
        return Started(process, lambda: _kill(process, group=True))


STRONGEST_FIRST: tuple[type[Mechanism], ...] = (ControlledBubblewrap, Bubblewrap, Landlocked)


@cache
def _groups() -> cgroups.Groups:
    return cgroups.find()


def memory_file(content: bytes = b"") -> int:
    """A file descriptor of a file in memory, at its start."""
    descriptor = os.memfd_create("sandbox")
    os.write(descriptor, content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _end_namespace(process: subprocess.Popen[bytes], info: int) -> None:
    """Kill the first process of bubblewrap's PID namespace, with which the kernel kills all others, and wait.

    Bubblewrap itself is left to reap it: its orphan would be a zombie wherever the machine's init does not reap, and
    zombies count against the limit of a control group.
    """
    with os.fdopen(info, "rb") as told:
        first = re.search(rb'"child-pid": (\d+)', told.read() or b"")
    if first is None:
        process.kill()
    elif process.poll() is None:
        with suppress(ProcessLookupError):  # it ended by itself at this moment
            os.kill(int(first[1]), signal.SIGKILL)
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _kill(process: subprocess.Popen[bytes], *, group: bool = False) -> None:
    """End a process and wait for it."""
    if group:
        with suppress(ProcessLookupError):  # all of it may be gone already
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()

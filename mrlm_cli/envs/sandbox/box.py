"""Runs one job under a mechanism and says what came of it, whatever the program does."""

from __future__ import annotations

import json
import marshal
import os
import selectors
import signal
import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from mrlm_cli.envs.sandbox import values
from mrlm_cli.envs.sandbox.mechanisms import Mechanism, Started, memory_file
from mrlm_cli.envs.sandbox.records import Call, Job, Kind, Limits, Result
from mrlm_cli.errors import SandboxFailure

START_SECONDS = 20.0  # for the sandbox to come up, on a busy machine; not the program's time
ATTEMPTS = 3
_CHUNK = 2**16
_SPARE_DESCRIPTORS = 64
_MOST_SAID = 4000  # bytes of what a sandbox that did not come up wrote to its standard error
_REASONS: dict[Kind, str] = {
    "time": "it took too long",
    "memory": "it used too much memory",
    "output": "it wrote too much",
    "died": "the process ended before it answered",
}


class NotStarted(Exception):
    """The sandbox did not come up."""


@dataclass(slots=True)
class Sandbox:
    """A mechanism that was seen to work here. Several threads may run jobs at once.

    `failures` counts runs that the sandbox itself lost, whether or not the next attempt succeeded.
    """

    mechanism: Mechanism
    failures: int = 0
    _lock: Lock = field(default_factory=Lock)

    @property
    def name(self) -> str:
        """The mechanism and the interpreter, in words."""
        return f"{self.mechanism.name}, {self.mechanism.python.executable}"

    def run(self, job: Job, limits: Limits) -> list[Result]:
        """One result for each test, in order. Raises SandboxFailure if the sandbox itself does not come up, thrice."""
        request = _request(job, limits, self.mechanism)
        for attempt in range(ATTEMPTS):
            try:
                lines, ended = _run(self.mechanism, request, limits)
            except (NotStarted, OSError) as error:
                with self._lock:
                    self.failures += 1
                if attempt == ATTEMPTS - 1:
                    raise SandboxFailure(f"the sandbox failed {ATTEMPTS} times: {error}") from error
            else:
                return _results(lines, ended, len(job.tests))
        raise AssertionError("unreachable")


def _request(job: Job, limits: Limits, mechanism: Mechanism) -> bytes:
    disk, memory = limits.disk_mib * 2**20, limits.memory_mib * 2**20
    return marshal.dumps(
        {
            "program": job.program,
            "form": job.form,
            "entry": job.entry,
            "tests": [marshal.dumps(test.arguments, 2) if isinstance(test, Call) else test.stdin for test in job.tests],
            "seconds": limits.test_seconds,
            "output": limits.output_kib * 1024,
            "rlimits": [
                ("RLIMIT_CORE", 0),
                ("RLIMIT_CPU", limits.cpu_seconds),
                ("RLIMIT_AS", memory),
                ("RLIMIT_FSIZE", disk),
                ("RLIMIT_NOFILE", _SPARE_DESCRIPTORS),
                ("RLIMIT_MEMLOCK", 0),
                ("RLIMIT_NPROC", limits.processes),
            ],
            "lockdown": mechanism.lockdown(),
        },
        2,  # a version that every interpreter reads
    )


def _run(mechanism: Mechanism, request: bytes, limits: Limits) -> tuple[list[bytes], Kind | None]:
    """Lines that came out, and what ended the program before its own end. Raises NotStarted, OSError."""
    with ExitStack() as stack:
        files = [memory_file(request), memory_file(), memory_file(), memory_file()]
        reading, writing = os.pipe()
        for descriptor in (*files, reading):
            stack.callback(os.close, descriptor)
        inherited = [files[0], writing, files[1], files[2]]
        try:
            arguments = ["-s", "-S", "-B", "-X", "utf8", "-c", _runner(), *map(str, inherited)]
            started = mechanism.start(arguments, [*inherited, files[3]], limits)
        finally:
            os.close(writing)
        ended: Kind | None
        begun = time.monotonic()
        try:
            data, ended = _read(reading, limits)
            if ended is None and not data.endswith(b'["end"]\n'):
                ended = _ending(started, max(1.0, limits.wall_seconds - (time.monotonic() - begun)))
        finally:
            started.end()
        first, *lines = data.split(b"\n")
        if first != b'["ready"]':
            said = os.pread(files[3], _MOST_SAID, 0).decode(errors="replace").strip().splitlines()
            raise NotStarted(said[-1] if said else f"it ended with code {started.process.returncode}")
    return lines, ended


def _read(reading: int, limits: Limits) -> tuple[bytes, Kind | None]:
    """All that comes through the pipe until its end or a limit."""
    data = b""
    most = 4 * limits.output_kib * 1024 + 4096  # in JSON a character may take six bytes, but most take one
    until = time.monotonic() + START_SECONDS
    waiting = True
    with selectors.DefaultSelector() as selector:
        selector.register(reading, selectors.EVENT_READ)
        while True:
            left = until - time.monotonic()
            if left <= 0:
                return data, "time"
            if not selector.select(left):
                continue
            piece = os.read(reading, _CHUNK)
            if not piece:
                return data, None
            data += piece
            if waiting and b"\n" in data:
                waiting, until = False, time.monotonic() + limits.wall_seconds
            if len(data) > most:
                return data, "output"
            if piece.endswith(b'["end"]\n'):
                return data, None


def _ending(started: Started, seconds: float) -> Kind:
    """Why the pipe closed early. Bubblewrap adds 128 to the number of a signal."""
    try:
        code = started.process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return "time"  # it closed the pipe and goes on
    if started.out_of_memory():
        return "memory"
    return "time" if code in (-signal.SIGXCPU, 128 + signal.SIGXCPU) else "died"


def _results(lines: list[bytes], ended: Kind | None, count: int) -> list[Result]:
    """A result for each test: the first that was sent for it, else why there is none."""
    found: dict[int, Result] = {}
    compiled = False  # from then on the program runs, and could send this itself to have a text of its own told
    for line in lines:
        match _parsed(line):
            case ["compiled"]:
                compiled = True
            case ["syntax", str(kind), str(text), int(number)] if not compiled:
                return [Result("syntax", text=f"{kind}: {text}", line=number)] * count
            case [int(index), *rest]:
                found.setdefault(index, _result(rest))
    reason: Kind = ended or "died"
    return [found.get(index) or Result(reason, text=_REASONS[reason]) for index in range(count)]


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # the program wrote into the pipe itself
        return None


def _result(words: list[Any]) -> Result:
    match words:
        case ["value", form]:
            try:
                return Result("value", value=values.decode(form))
            except ValueError:
                return Result("died", text=_REASONS["died"])
        case ["printed", str(text)]:
            return Result("printed", text=text)
        case ["error", str(kind), str(text), int(line)]:
            return Result("error", text=f"{kind}: {text}" if text else kind, line=line)
        case ["time" | "memory" | "output" as reason]:
            return Result(reason, text=_REASONS[reason])
    return Result("died", text=_REASONS["died"])


@cache
def _runner() -> str:
    return Path(__file__).with_name("runner.py").read_text(encoding="utf-8")

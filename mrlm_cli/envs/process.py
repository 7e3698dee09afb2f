"""One worker process as its parent sees it: started, asked with a deadline, killed."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import IO, Any

from mrlm_cli import blame
from mrlm_cli.envs.starting import Deadline
from mrlm_cli.envs.troubles import Troubles
from mrlm_cli.envs.wire import FOLDER, HEADER, MAX_FRAME, frame
from mrlm_cli.errors import MrlmError

START_SECONDS = 120.0  # for an interpreter to start and import what it is to hold
POLL_SECONDS = 0.1  # between looks at the stop event and at whether the process lives
CHUNK = 2**16  # bytes of a read or write


class LateError(Exception):
    """The deadline passed."""


class DiedError(Exception):
    """The process ended, or broke the protocol."""


class StoppedError(Exception):
    """The parent wants to end."""


class WorkerProcess:
    """A fresh interpreter in a process group of its own, so that a kill reaches what the environment has started.

    Its temporary files go to a folder of its own, which a kill removes.

    Answers come through a pipe that user code cannot print into; what it prints goes line by line to this process's
    stderr. What the environment leaves in another session (setsid) survives.
    """

    def __init__(self, name: str, stopping: Event, troubles: Troubles, module: str = "mrlm_cli.envs.worker") -> None:
        self._name = name
        self._troubles = troubles
        self._stopping = stopping
        self._folder = tempfile.TemporaryDirectory(prefix=FOLDER, ignore_cleanup_errors=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**_environment(), "TMPDIR": self._folder.name},
            start_new_session=True,
            close_fds=True,
            bufsize=0,
        )
        self._requests = _unblocked(self._process.stdin)
        self._answers = _unblocked(self._process.stdout)
        self._printed = _unblocked(self._process.stderr)
        self._line = b""

    def ask(self, request: bytes, seconds: float) -> dict[str, Any]:
        """The answer to one framed request; what the worker spends on starting something does not count (`starting`).

        Raises LateError, DiedError or StoppedError, after each of which the process must be killed.
        """
        deadline = Deadline(seconds)
        unsent, told = memoryview(request), b""
        fields: dict[str, Any] | None = None
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            selector.register(self._printed, selectors.EVENT_READ)
            selector.register(self._requests, selectors.EVENT_WRITE)
            while fields is None:
                if self._stopping.is_set():
                    raise StoppedError
                left = deadline.left()
                if left <= 0:
                    raise LateError
                ready = {key.fileobj for key, _ in selector.select(min(left, POLL_SECONDS))}
                if self._requests in ready:
                    unsent = unsent[self._write(unsent) :]
                    if not unsent:
                        selector.unregister(self._requests)
                if self._printed in ready and not self._forward():
                    selector.unregister(self._printed)
                if self._answers in ready:
                    told += self._read(self._answers)
                    fields, told = _answer(told, deadline)
                elif self._process.poll() is not None:
                    raise DiedError(self._ending())
        self._forward()
        if "trace" in fields:
            self._troubles.tell(self._name, fields.pop("trace"))
        return fields

    def initialise(self, folders: Sequence[Path], **held: Any) -> None:
        """Tell the worker what to hold; `folders` lead its sys.path. Raises MrlmError if it cannot start.

        After an error the process must be killed.
        """
        request = {"op": "init", "folders": [str(folder.resolve()) for folder in folders], "debug": blame.debug, **held}
        try:
            answer = self.ask(frame(request), START_SECONDS)
        except LateError:
            answer = {"failure": f"not ready after {START_SECONDS:g} s"}
        except DiedError as died:
            answer = {"failure": str(died)}
        if "failure" in answer:
            raise MrlmError(f"{self._name} cannot start: {answer['failure']}")

    def kill(self) -> None:
        """End the whole process group, now."""
        with suppress(ProcessLookupError):  # all of it may be gone already
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        while self._forward():
            pass
        for stream in (self._requests, self._answers, self._printed):
            stream.close()
        self._folder.cleanup()

    def _write(self, data: memoryview) -> int:
        try:
            return self._requests.write(data[:CHUNK]) or 0
        except BrokenPipeError:
            raise DiedError(self._ending()) from None

    def _read(self, stream: IO[bytes]) -> bytes:
        data = stream.read(CHUNK)
        if not data:
            raise DiedError(self._ending())
        return data

    def _forward(self) -> bool:
        """Pass on what was printed; False when nothing is there any more."""
        data = self._printed.read(CHUNK)
        *lines, self._line = (self._line + (data or b"")).split(b"\n")
        if not data and self._line:
            lines, self._line = [*lines, self._line], b""
        for line in lines:
            print(f"{self._name}: {line.decode(errors='replace')}", file=sys.stderr)
        return bool(data)

    def _ending(self) -> str:
        """How the process ended, in words that are the same at every repetition."""
        try:
            code = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "the worker process closed its pipe"
        if code < 0:
            return f"the worker process was killed by signal {-code}"
        return f"the worker process exited with code {code}"


def _unblocked(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise ValueError("not a pipe")
    os.set_blocking(pipe.fileno(), False)
    return pipe


def _answer(told: bytes, deadline: Deadline) -> tuple[dict[str, Any] | None, bytes]:
    """(the answer if it is whole, what is left of the bytes); frames before it are for the clock."""
    while len(told) >= HEADER.size:
        (length,) = HEADER.unpack(told[: HEADER.size])
        if length > MAX_FRAME:
            raise DiedError("the worker process broke the protocol of its pipe")
        end = HEADER.size + length
        if len(told) < end:
            break
        fields: dict[str, Any] = json.loads(told[HEADER.size : end])
        told = told[end:]
        if not deadline.heeds(fields):
            return fields, told
    return None, told


def _environment() -> dict[str, str]:
    """This process's variables, with a path to this package where no installation gives one."""
    root = Path(__file__).resolve().parents[2]
    if root.name in ("site-packages", "dist-packages"):
        return dict(os.environ)
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}

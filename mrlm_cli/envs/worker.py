"""A worker process: sessions of environments that are not built in. `python -m mrlm_cli.envs.worker`.

It answers requests in order, one at a time, in its main thread:

    {"op": "init", "folders": [...], "environments": {label: {"type": ..., "config": JSON text}}}   -> {"turns": []}
    {"op": "task", "env": label, "split": "train", "index": 0}                    -> {"turns": [the task]}
    {"op": "open", "session": name, "task": {...}, "seed": 0, "replies": [...]}  -> {"turns": [first, one a reply]}
    {"op": "step", "session": name, "reply": {...}}                              -> {"turns": [one]}
    {"op": "close", "session": name}                                             -> {"turns": []}

or {"failure": text} where the environment broke, with a "trace" of what it raised; before either, frames that rest the
parent's clock (see `starting`). Frames are four bytes of length and
a line of JSON; the pipes are duplicated before any user code runs, and descriptor 1 becomes stderr, so that printing
cannot break the protocol. Interrupts are ignored, since the trainer decides when to end; when the trainer is gone, the
process group ends itself.
This is no sandbox: user code may do what the user may do.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import IO, Any

from mrlm_cli import blame
from mrlm_cli.envs.base import Environment, Session
from mrlm_cli.envs.starting import tell_parent
from mrlm_cli.envs.troubles import trace
from mrlm_cli.envs.wire import (
    FOLDER,
    HEADER,
    check_turn,
    describe_exception,
    frame,
    reply_from_json,
    task_from_json,
    task_to_json,
    turn_to_json,
)
from mrlm_cli.errors import SessionFailure
from mrlm_cli.records import Split, Task
from mrlm_cli.registry import resolve


class Sessions:
    """The environments of this process and their open sessions."""

    def __init__(self) -> None:
        self._environments: dict[str, Environment] = {}
        self._sessions: dict[str, tuple[Session, Environment]] = {}

    def answer(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The turns that a request leads to. Raises whatever the environment raises."""
        match request["op"]:
            case "init":
                self._init(request["folders"], request["environments"])
                return []
            case "task":
                return [self._task(request["env"], request["split"], request["index"])]
            case "open":
                return self._open(request)
            case "step":
                return [self._step(request["session"], request["reply"])]
            case "close":
                if held := self._sessions.pop(request["session"], None):  # there is none if `open` failed
                    held[0].close()
                return []
        raise ValueError(f"unknown request {request['op']!r}")

    def _init(self, folders: list[str], environments: Mapping[str, Mapping[str, str]]) -> None:
        sys.path[:0] = folders
        for label, settings in environments.items():
            found = resolve("environments", settings["type"], [Path(folder) for folder in folders])
            self._environments[label] = found(found.Config.model_validate_json(settings["config"]))

    def _task(self, label: str, split: Split, index: int) -> dict[str, Any]:
        made = self._environments[label].task(split, index)
        if not isinstance(made, Task):
            raise SessionFailure(f"it must be a Task of env {label!r}, not {type(made).__name__}")
        return task_to_json(made)

    def _open(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        task = task_from_json(request["task"])
        environment = self._environments[task.env]
        session = environment.open(task, request["seed"])
        self._sessions[request["session"]] = session, environment
        first = turn_to_json(check_turn(session.start(), environment))
        return [first, *(self._step(request["session"], reply) for reply in request["replies"])]

    def _step(self, name: str, reply: Mapping[str, Any]) -> dict[str, Any]:
        session, environment = self._sessions[name]
        return turn_to_json(check_turn(session.step(reply_from_json(reply)), environment))


def serve(answer: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
    """Answer requests until the pipe closes; what `answer` raises becomes {"failure": text, "trace": …}."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, answers = _take_pipes()
    _prefer_to_die()
    inbox: SimpleQueue[dict[str, Any]] = SimpleQueue()
    Thread(target=_receive, args=(requests, inbox), daemon=True).start()

    def send(data: bytes) -> None:
        answers.write(data)
        answers.flush()

    tell_parent(lambda fields: send(frame(fields)))
    while True:
        request = inbox.get()
        if request.get("op") == "init":
            blame.debug = request.get("debug", False)  # what processes of its own raise is told here
        try:
            data = frame(answer(request))
        except BaseException as error:  # user code ends here, SystemExit included
            told = {} if isinstance(error, SessionFailure) else {"trace": trace(error)}
            data = frame({"failure": describe_exception(error), **told})
        send(data)


def _take_pipes() -> tuple[IO[bytes], IO[bytes]]:
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    return requests, answers


def _prefer_to_die() -> None:
    """Where memory runs out, Linux shall end this process before the trainer: a session can be rebuilt."""
    with suppress(OSError):  # a wish, not a need: there may be no such file, or none to write
        Path("/proc/self/oom_score_adj").write_text("1000")


def _receive(requests: IO[bytes], inbox: SimpleQueue[dict[str, Any]]) -> None:
    """Read in a thread of its own, so that a trainer's end is seen also while user code runs."""
    while len(header := requests.read(HEADER.size)) == HEADER.size:
        inbox.put(json.loads(requests.read(HEADER.unpack(header)[0])))
    if Path(tempfile.gettempdir()).name.startswith(FOLDER):  # a trainer that was killed cannot remove it any more
        shutil.rmtree(tempfile.gettempdir(), ignore_errors=True)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    sessions = Sessions()
    serve(lambda request: {"turns": sessions.answer(request)})

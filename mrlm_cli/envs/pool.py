"""A worker: one thread that keeps a worker process going, and rebuilds in a new one the sessions that a kill lost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, TypeVar

from mrlm_cli.envs.base import Environment
from mrlm_cli.envs.process import DiedError, LateError, StoppedError, WorkerProcess
from mrlm_cli.envs.troubles import Troubles
from mrlm_cli.envs.wire import frame, reply_to_json, task_from_json, task_to_json, turn_from_json
from mrlm_cli.errors import DeadlineExceeded, HungReply, MrlmError, SessionFailure
from mrlm_cli.records import Message, Reply, Split, Task, Turn

Outcome = Turn | SessionFailure
T = TypeVar("T")
HUNG = "the reply hangs the checker"  # begins what the journal keeps of a HungReply


@dataclass(slots=True)
class _Held:
    """What rebuilds a session: it is a function of its task, seed and replies."""

    task: Task
    seed: int
    replies: list[Reply] = field(default_factory=list)
    shown: list[bytes] = field(default_factory=list)  # digests of its turns so far


class Worker:
    """Requests return at once and are answered in order. The process starts with the first one.

    A session that does not answer in `deadline` seconds fails, and the process is killed. A session in whose turn the
    process dies is rebuilt once, and fails if that kills the process again. The other sessions of the process are
    rebuilt when their next reply comes, with the deadline for each of their answers; one that then shows other turns
    than before fails. Where an environment has `judging_seconds`, they bound a reply, and a late one is put to the
    proof.
    """

    def __init__(
        self,
        number: int,
        environments: Mapping[str, Environment],
        folders: Sequence[Path],
        deadline: float,
        troubles: Troubles,
    ) -> None:
        self._name = f"environment worker {number}"
        self._environments = environments
        self._folders = folders
        self._deadline = deadline
        self._troubles = troubles
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._stopping = Event()
        self._thread: Thread | None = None
        self._process: WorkerProcess | None = None
        self._inside: set[str] = set()  # sessions that the present process knows
        self._held: dict[str, _Held] = {}

    def task(self, label: str, split: Split, index: int) -> Future[Task | SessionFailure]:
        """The environment's task, or why there is none."""

        def make() -> Task | SessionFailure:
            request = {"op": "task", "env": label, "split": split, "index": index}
            try:
                answer = self._running().ask(frame(request), self._deadline)
            except LateError:
                self._end_process()
                return DeadlineExceeded(f"no answer within {self._deadline:g} s")
            except DiedError as died:
                self._end_process()
                return SessionFailure(str(died))
            return SessionFailure(answer["failure"]) if "failure" in answer else task_from_json(answer["turns"][0])

        return self._promise(make)

    def open(self, name: str, task: Task, seed: int) -> Future[Outcome]:
        """Begin a session."""

        def begin() -> Outcome:
            self._held[name] = _Held(task, seed)
            return self._answer(name)

        return self._promise(begin)

    def step(self, name: str, reply: Reply) -> Future[Outcome]:
        """Give a reply to a session that has not failed."""

        def go_on() -> Outcome:
            self._held[name].replies.append(reply)
            return self._answer(name)

        return self._promise(go_on)

    def repeat(self, name: str, reply: Reply, shown: Mapping[str, Any]) -> None:
        """Take a reply whose turn is known: the session is rebuilt when a turn of it is asked for that is not."""

        def go_on() -> None:
            self._held[name].replies.append(reply)
            self._held[name].shown.append(_digest(shown))
            self._leave(name)

        self._submit(go_on)

    def close(self, name: str) -> None:
        """End a session; nobody waits for it."""
        self._submit(lambda: self._close(name))

    def stop(self) -> None:
        """Take no more requests; those under way are finished."""
        self._jobs.put(None)

    def join(self, seconds: float) -> None:
        """Wait so long for the requests under way, then abandon them, and kill the process."""
        if self._thread is not None:
            self._thread.join(seconds)
            self._stopping.set()
            self._thread.join()

    def _promise(self, make: Callable[[], T]) -> Future[T]:
        promised: Future[T] = Future()

        def job() -> None:
            try:
                promised.set_result(make())
            except StoppedError:
                promised.cancel()
                raise
            except BaseException as error:  # carried to the thread that waits
                promised.set_exception(error)

        self._submit(job)
        return promised

    def _submit(self, job: Callable[[], None]) -> None:
        if self._thread is None:
            self._thread = Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def _run(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                job()
        except StoppedError:
            pass  # nobody waits for what is left
        finally:
            self._end_process()

    def _answer(self, name: str) -> Outcome:
        """The session's next turn."""
        outcome = self._attempt(name)
        if isinstance(outcome, DiedError):
            outcome = self._attempt(name)
        if isinstance(outcome, DeadlineExceeded) and self._is_to_blame(self._held[name]):
            outcome = HungReply(f"{HUNG}: {outcome}, where the right one is judged in time")
        if isinstance(outcome, Turn):
            return outcome
        del self._held[name]
        return SessionFailure(f"{outcome}, twice") if isinstance(outcome, DiedError) else outcome

    def _attempt(self, name: str) -> Outcome | DiedError:
        held, process = self._held[name], self._running()
        known = name in self._inside
        self._inside.add(name)
        request: dict[str, Any]
        if known:
            request = {"op": "step", "session": name, "reply": reply_to_json(held.replies[-1])}
        else:
            replies = [reply_to_json(reply) for reply in held.replies]
            request = {"op": "open", "session": name, "seed": held.seed, "replies": replies}
            request["task"] = task_to_json(held.task)
        try:
            data = frame(request)
        except (TypeError, ValueError) as error:
            return SessionFailure(f"its task cannot be sent to a worker process: {error}")
        judging = self._environments[held.task.env].judging_seconds or self._deadline
        seconds = min(self._deadline, judging) if known else self._deadline * (1 + len(held.replies))
        try:
            answer = process.ask(data, seconds)
        except LateError:
            self._end_process()
            return DeadlineExceeded(f"no answer within {seconds:g} s")
        except DiedError as died:
            self._end_process()
            return died
        if "failure" in answer:
            return SessionFailure(answer["failure"])
        *before, now = answer["turns"]
        if not known and [_digest(turn) for turn in before] != held.shown:
            return SessionFailure("rebuilt from its task, seed and replies, the session showed other turns than before")
        held.shown.append(_digest(now))
        return turn_from_json(now)

    def _is_to_blame(self, held: _Held) -> bool:
        """Whether the last reply, and not the checker or the machine, is why the session was late: judged in a new
        process, the right reply is not."""
        environment = self._environments[held.task.env]
        right = environment.oracle(held.task) if environment.judging_seconds is not None and held.replies else None
        if not isinstance(right, str):
            return False
        name = "proof"
        replies = [reply_to_json(Reply(Message("assistant", right), "end"))]
        request = {"op": "open", "session": name, "seed": held.seed, "replies": replies}
        try:
            # The first reply of a process may have to import the checker, so the full deadline holds.
            answer = self._running().ask(frame({**request, "task": task_to_json(held.task)}), 2 * self._deadline)
            self._inside.add(name)
            self._close(name)
        except (LateError, DiedError):
            self._end_process()
            return False
        return "failure" not in answer

    def _close(self, name: str) -> None:
        self._held.pop(name, None)
        self._leave(name)

    def _leave(self, name: str) -> None:
        """End the session in the process, if it is there."""
        if self._process is None or name not in self._inside:
            return
        self._inside.remove(name)
        try:
            self._process.ask(frame({"op": "close", "session": name}), self._deadline)
        except (LateError, DiedError):
            self._end_process()

    def _running(self) -> WorkerProcess:
        if self._process is None:
            self._process = WorkerProcess(self._name, self._stopping, self._troubles)
            environments = {
                label: {"type": made.config.type, "config": made.config.model_dump_json()}
                for label, made in self._environments.items()
            }
            try:
                self._process.initialise(self._folders, environments=environments)
            except MrlmError:
                self._end_process()
                raise
        return self._process

    def _end_process(self) -> None:
        if self._process is not None:
            self._process.kill()
        self._process = None
        self._inside.clear()


def _digest(turn: Mapping[str, Any]) -> bytes:
    """Of what the agents see; rewards and facts already given stand as they are."""
    shown = [turn["messages"], turn["agent"], turn["tools"], turn["done"]]
    return hashlib.blake2b(json.dumps(shown, sort_keys=True).encode(), digest_size=16).digest()

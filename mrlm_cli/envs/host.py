"""Runs the sessions of all environments: built-in ones in this process, a user's in worker processes with deadlines.

    with Host(settings, folders=folders, workers=2, deadline=30.0, journal=journal) as host:
        task = host.environments["guess"].task("train", 0)
        ticket = host.open([("session name", task, seed)])      # returns at once
        turn = host.collect(ticket)["session name"]             # waits: a Turn or a SessionFailure
        ticket = host.step([("session name", reply)])
        host.close(["session name"])

Of a user's environment `size`, `oracle` and `part` are called in this process; its sessions live in workers, and its
`task` is asked there as well, under the deadline. Built-in sessions run inside `open` and `step`, with no deadline:
they are audited to answer at once.

A failure in a worker is decided by clocks, memory or a network, so it is written to the journal, and a replay of the
same session and turn gives the journal's failure without asking the environment. So is what an environment answers that
is `journalled`: its session is asked for none but answers that the journal lacks, and rebuilt for the first of them.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from mrlm_cli.envs.base import Environment, EnvironmentSettings, Session
from mrlm_cli.envs.failures import Failures
from mrlm_cli.envs.pool import HUNG, Outcome, Worker
from mrlm_cli.envs.troubles import Troubles, trace
from mrlm_cli.envs.wire import check_turn, describe_exception, reply_to_json, turn_from_json, turn_to_json
from mrlm_cli.errors import HungReply, ScoringError, SessionFailure, UserError
from mrlm_cli.records import Reply, Split, Task, Turn
from mrlm_cli.registry import resolve

GRACE_SECONDS = 2.0  # for sessions to close when the host is shut down
CHECK_SECONDS = 0.1  # between calls of `check` while a turn is awaited


class Journal(Protocol):
    """What clocks decided, so that a replay decides the same. A turn is counted by the session's replies before it."""

    def recall(self, session: str, turn: int) -> str | None:
        """The failure recorded for this turn, if there is one."""

    def record(self, session: str, turn: int, failure: str) -> None:
        """Keep a failure; it must be on disk, or lost together with everything that follows from it."""

    def keep_traceback(self, text: str) -> Path | None:
        """Keep the traceback of an exception for whoever looks for the mistake; says where, None if nowhere."""

    def recall_turn(self, session: str, turn: int, digest: str) -> Mapping[str, Any] | None:
        """The turn recorded for a reply with this digest, if there is one."""

    def record_turns(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep turns as rows of session, turn, digest and shown, like `record`."""


class NoJournal:
    """For evaluations, which are never replayed."""

    def recall(self, session: str, turn: int) -> str | None:
        """Nothing is remembered."""
        return None

    def record(self, session: str, turn: int, failure: str) -> None:
        """Nothing is kept."""

    def keep_traceback(self, text: str) -> Path | None:
        """There is no run to keep it in."""
        return None

    def recall_turn(self, session: str, turn: int, digest: str) -> None:
        """Nothing is remembered."""
        return

    def record_turns(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Nothing is kept."""

    def recall_score(self, session: str, reward: str, digest: str) -> None:
        """Nothing is remembered of rewards either."""
        return

    def record_scores(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Nothing is kept."""


@dataclass(frozen=True, slots=True)
class _Awaited:
    session: str
    label: str
    turn: int
    outcome: Future[Outcome]
    journalled: bool  # a failure that it comes to must be written to the journal
    digest: str = ""  # of the reply, where a turn that it comes to must be, too


@dataclass(frozen=True, slots=True)
class Ticket:
    """Turns on their way; give it to `collect` once."""

    entries: tuple[_Awaited, ...]


@dataclass(slots=True)
class _Open:
    label: str
    turns: int
    session: Session | None = None  # in this process
    worker: Worker | None = None
    failed: bool = False


class Host:
    """All sessions of a run. A context manager: leaving it ends the worker processes.

    `workers` is the number of worker processes, started only if an environment is not built in; `deadline` is in
    seconds for each answer; `check` is called now and then while `collect` waits, and may raise.
    Raises UserError where two environments share a name, MissingExtra where a package is not installed.
    """

    def __init__(
        self,
        environments: Sequence[EnvironmentSettings],
        *,
        folders: Sequence[Path],
        workers: int,
        deadline: float,
        journal: Journal,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.environments: dict[str, Environment] = {}
        self._journal = journal
        self._check = check
        self._sessions: dict[str, _Open] = {}
        self._awaited: _Awaited | None = None
        self._opened = 0
        self._failures = {settings.label: Failures(settings.max_failed) for settings in environments}
        outside: dict[str, Environment] = {}
        for settings in environments:
            label = settings.label
            if label in self.environments:
                raise UserError(f"two environments are called {label!r}; give one of them a name")
            found = resolve("environments", settings.type, folders)
            environment = self.environments[label] = found(settings)
            if not _in_process(environment):
                outside[label] = environment
        self._outside = frozenset(outside)
        self._troubles = Troubles(journal.keep_traceback)
        number = workers if outside else 0
        self._workers = [Worker(i, outside, folders, deadline, self._troubles) for i in range(number)]
        for label, environment in outside.items():  # whoever asks this instance for a task has the deadline kept
            environment.task = partial(self._task, label)  # type: ignore[method-assign]

    def open(self, opened: Sequence[tuple[str, Task, int]]) -> Ticket:
        """Begin sessions (name, task, seed); names must be new. Raises ValueError for one that is not."""
        return Ticket(tuple(self._begin(name, task, seed) for name, task, seed in opened))

    def step(self, replies: Sequence[tuple[str, Reply]]) -> Ticket:
        """Give a reply to each named session. Raises ValueError for a session that is not open or has failed."""
        return Ticket(tuple(self._continue(name, reply) for name, reply in replies))

    def collect(self, ticket: Ticket) -> dict[str, Outcome]:
        """Wait for every turn of the ticket, in its order. A failed session stays to be closed.

        Raises ScoringError if more of an environment's last sessions failed than may.
        """
        outcomes: dict[str, Outcome] = {}
        rows = []
        for entry in ticket.entries:
            outcome = self._wait(entry)
            if entry.digest and isinstance(outcome, Turn):
                shown = turn_to_json(outcome)
                rows.append({"session": entry.session, "turn": entry.turn, "digest": entry.digest, "shown": shown})
            if isinstance(outcome, SessionFailure):
                self._sessions[entry.session].turns = -1
                if entry.journalled:
                    self._journal.record(entry.session, entry.turn, str(outcome))
            outcomes[entry.session] = outcome = self._judged(entry.label, outcome)
            if isinstance(outcome, SessionFailure):
                self._sessions[entry.session].failed = True
                failures = self._failures[entry.label]
                failures.add([str(outcome)])
                if failures.too_many is not None:
                    raise ScoringError(f"environment {entry.label} {failures.too_many}")
        self._journal.record_turns(rows)
        return outcomes

    def _judged(self, label: str, outcome: Outcome) -> Outcome:
        """The outcome; a reply that hung its checker is wrong, and where that may happen, the fact `hung` says so."""
        environment = self.environments[label]
        if isinstance(outcome, HungReply):
            wrong = dict.fromkeys(environment.declared(environment.config), 0.0)
            return Turn(rewards={"policy": wrong}, done=True, facts={"hung": 1.0})
        if environment.judging_seconds is None or isinstance(outcome, SessionFailure) or not outcome.done:
            return outcome
        return replace(outcome, facts={**outcome.facts, "hung": 0.0})

    def close(self, sessions: Iterable[str]) -> None:
        """End sessions, whether done, failed or in the middle; unknown names are ignored."""
        for name in sessions:
            held = self._sessions.pop(name, None)
            if held is None:
                continue
            if not held.failed:  # whether it came to its end or was cut short
                self._failures[held.label].add([None])
            if held.session is not None:
                held.session.close()
            if held.worker is not None:
                held.worker.close(name)

    def thinks_apart(self, label: str) -> bool:
        """Whether sessions of this environment run in worker processes, so that others may go on meanwhile."""
        return label in self._outside

    def waiting(self) -> str:
        """Who is awaited, in words; empty if nobody is."""
        awaited = self._awaited
        return f"environment {awaited.label}, session {awaited.session}, turn {awaited.turn}" if awaited else ""

    def shutdown(self) -> None:
        """Close what is open and end the worker processes; one that is still busy after two seconds is killed."""
        self.close(list(self._sessions))
        until = time.monotonic() + GRACE_SECONDS
        for worker in self._workers:
            worker.stop()
        for worker in self._workers:
            worker.join(max(0.0, until - time.monotonic()))
        for label, environment in self.environments.items():
            try:
                environment.close()
            except Exception as error:  # a border: what a user's code raises here must not undo a finished run
                print(f"environment {label}: close() raised {describe_exception(error)}", file=sys.stderr)

    def __enter__(self) -> Host:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _task(self, label: str, split: Split, index: int) -> Task:
        """An environment's task, made in a worker process. Raises UserError: without its tasks a run has no sense."""
        promised = self._workers[0].task(label, split, index)
        while not wait([promised], timeout=CHECK_SECONDS).done:
            self._check()
        made = promised.result()
        if isinstance(made, SessionFailure):
            raise UserError(f"environment {label}: task({split!r}, {index}): {made}")
        return made

    def _begin(self, name: str, task: Task, seed: int) -> _Awaited:
        if name in self._sessions:
            raise ValueError(f"session {name!r} is already open")
        held = self._sessions[name] = _Open(task.env, 0)
        if task.env in self._outside:
            # The order of opening alone decides who runs what: clocks must not.
            held.worker = self._workers[self._opened % len(self._workers)]
            self._opened += 1
            worker = held.worker
            return self._ask(name, held, lambda: worker.open(name, task, seed))
        environment = self.environments[task.env]

        def begin() -> Future[Outcome]:
            def start() -> Outcome:
                held.session = environment.open(task, seed)
                return check_turn(held.session.start(), environment)

            return self._now(start)

        return self._ask(name, held, begin)

    def _continue(self, name: str, reply: Reply) -> _Awaited:
        held = self._sessions.get(name)
        if held is None or held.turns < 0:
            raise ValueError(f"session {name!r} is not open" if held is None else f"session {name!r} has failed")
        held.turns += 1
        if held.worker is not None:
            return self._told(name, held, held.worker, reply)
        session, environment = held.session, self.environments[held.label]
        if session is None:
            raise ValueError(f"session {name!r} has not started")
        return self._ask(name, held, lambda: self._now(lambda: check_turn(session.step(reply), environment)))

    def _told(self, name: str, held: _Open, worker: Worker, reply: Reply) -> _Awaited:
        if not self.environments[held.label].journalled:
            return self._ask(name, held, lambda: worker.step(name, reply))
        digest = hashlib.blake2b(json.dumps(reply_to_json(reply)).encode(), digest_size=16).hexdigest()
        shown = self._journal.recall_turn(name, held.turns, digest)
        if shown is None:
            return replace(self._ask(name, held, lambda: worker.step(name, reply)), digest=digest)
        worker.repeat(name, reply, shown)
        known: Future[Outcome] = Future()
        known.set_result(turn_from_json(shown))
        return _Awaited(name, held.label, held.turns, known, journalled=False)

    def _ask(self, name: str, held: _Open, ask: Callable[[], Future[Outcome]]) -> _Awaited:
        if held.worker is None:
            return _Awaited(name, held.label, held.turns, ask(), journalled=False)
        recalled = self._journal.recall(name, held.turns)
        if recalled is None:
            return _Awaited(name, held.label, held.turns, ask(), journalled=True)
        known: Future[Outcome] = Future()
        judged = self.environments[held.label].judging_seconds is not None
        known.set_result(HungReply(recalled) if judged and recalled.startswith(HUNG) else SessionFailure(recalled))
        return _Awaited(name, held.label, held.turns, known, journalled=False)

    def _now(self, ask: Callable[[], Outcome]) -> Future[Outcome]:
        """Done at once. A built-in environment's bug fails its session as a user's would; a UserError propagates."""
        outcome: Future[Outcome] = Future()
        try:
            outcome.set_result(ask())
        except SessionFailure as failure:
            outcome.set_result(failure)
        except UserError:
            raise
        except Exception as error:
            self._troubles.tell("environment", trace(error))
            outcome.set_result(SessionFailure(describe_exception(error)))
        return outcome

    def _wait(self, entry: _Awaited) -> Outcome:
        self._awaited = entry
        try:
            while not wait([entry.outcome], timeout=CHECK_SECONDS).done:
                self._check()
            return entry.outcome.result()
        finally:
            self._awaited = None


def _in_process(environment: Environment) -> bool:
    # A user's subclass of a built-in environment inherits `audited`, but nobody audited it.
    return environment.audited and environment.in_process and type(environment).__module__.startswith("mrlm_cli.")

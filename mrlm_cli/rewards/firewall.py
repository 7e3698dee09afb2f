"""Rewards behind a wall: each runs in worker processes with a deadline, so none can hang, crash or poison a training.

    with Scorers(settings, folders=folders, workers=2, journal=journal, check=check) as scorers:
        scorers.score([("session name", transcript)])   -> [{label: {agent: value} or Failure}]

A worker process that misses a deadline is killed, even inside a regular expression that holds the interpreter's lock;
one that dies is asked once more in a new process. What comes back is checked: exceptions, None, NaN and values outside
a reward's low and high are Failures. Failures, and all answers of remote judges, go to the journal, and are read back
on a replay of the same session with the same transcript.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event
from typing import Any, Protocol

from mrlm_cli.envs.failures import Failures
from mrlm_cli.envs.process import DiedError, LateError, WorkerProcess
from mrlm_cli.envs.troubles import Troubles
from mrlm_cli.envs.wire import frame
from mrlm_cli.errors import MrlmError, ScoringError
from mrlm_cli.records import Transcript
from mrlm_cli.registry import resolve
from mrlm_cli.rewards.base import Failure, Outcome, Reward, RewardSettings
from mrlm_cli.rewards.wire import outcome_from_json, outcome_to_json, transcript_to_json

CHECK_SECONDS = 0.1  # between calls of `check` while outcomes are awaited
LONGEST = 2**20  # characters of a transcript, far above any context; several must fit in one message
MARGIN_SECONDS = 5.0  # that a reward which keeps its own deadline over several transcripts may be late


class ScoreJournal(Protocol):
    """What clocks, crashes and remote judges decided, so that a replay decides the same."""

    def recall_score(self, session: str, reward: str, digest: str) -> Mapping[str, Any] | None:
        """The outcome recorded for this session's transcript, if there is one."""

    def record_scores(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep outcomes: rows of session, reward, digest, and `values` or `failure`."""

    def keep_traceback(self, text: str) -> Path | None:
        """Keep the traceback of an exception for whoever looks for the mistake; says where, None if nowhere."""


class Scorers:
    """All rewards of a run. A context manager: leaving it ends the worker processes.

    Raises UserError where a reward cannot be made, MissingExtra where a package is not installed.
    """

    def __init__(
        self,
        rewards: Sequence[RewardSettings],
        *,
        folders: Sequence[Path],
        workers: int,
        journal: ScoreJournal,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.weights = {settings.label: settings.weight for settings in rewards}
        self._rewards: dict[str, Reward] = {
            settings.label: resolve("rewards", settings.type, folders)(settings) for settings in rewards
        }
        self._failures = {settings.label: Failures(settings.max_failed) for settings in rewards}
        self._journal = journal
        self._check = check
        self._awaited = ""
        troubles = Troubles(journal.keep_traceback)
        self._workers = [_Worker(number, rewards, folders, troubles) for number in range(workers if rewards else 0)]

    def score(self, sessions: Sequence[tuple[str, Transcript]], *, only: str | None = None) -> list[dict[str, Outcome]]:
        """What each reward, or `only` the one of this name, gives to each session.

        Raises ScoringError if one fails on too many of the run's last sessions.
        """
        if not self._rewards:
            return [{} for _ in sessions]
        texts = [_sendable(transcript) for _, transcript in sessions]
        digests = ["" if isinstance(text, Failure) else _digest(text) for text in texts]
        found: list[dict[str, Outcome]] = [{} for _ in sessions]
        rows: list[dict[str, Any]] = []
        asked: list[tuple[str, list[int], Future[list[Outcome]]]] = []
        labels = list(self._rewards) if only is None else [only]
        for label in labels:
            reward, fresh = self._rewards[label], []
            for place, (name, _) in enumerate(sessions):
                text = texts[place]
                known = self._journal.recall_score(name, label, digests[place])
                if isinstance(text, Failure):
                    found[place][label] = text
                elif known is not None:
                    found[place][label] = outcome_from_json(known)
                else:
                    fresh.append((place, text))
            asked += self._ask(label, reward, fresh)
        for label, places, promised in asked:
            self._awaited = f"reward {label}"
            for place, outcome in zip(places, self._wait(promised), strict=True):
                found[place][label] = outcome
                if self._rewards[label].remote or isinstance(outcome, Failure):
                    key = {"session": sessions[place][0], "reward": label, "digest": digests[place]}
                    rows.append({**key, **outcome_to_json(outcome)})
        self._awaited = ""
        self._stop_if_too_many(found)
        self._journal.record_scores(rows)
        # In the order of the recipe, whoever was asked and whoever remembered.
        return [{label: outcomes[label] for label in labels} for outcomes in found]

    def fingerprints(self) -> dict[str, str]:
        """Reward → hash of the files that decide its values, for those that have such. Raises CheckpointError."""
        found = {label: reward.fingerprint() for label, reward in self._rewards.items()}
        return {label: each for label, each in found.items() if each is not None}

    def waiting(self) -> str:
        """Who is awaited, in words; empty if nobody is."""
        return self._awaited

    def shutdown(self) -> None:
        """End the worker processes, now."""
        for worker in self._workers:
            worker.shutdown()

    def __enter__(self) -> Scorers:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()

    def _ask(
        self, label: str, reward: Reward, fresh: Sequence[tuple[int, str]]
    ) -> list[tuple[str, list[int], Future[list[Outcome]]]]:
        size = reward.at_once
        seconds = reward.config.deadline + (MARGIN_SECONDS if size > 1 else 0.0)
        asked = []
        for number, start in enumerate(range(0, len(fresh), size)):
            chunk = fresh[start : start + size]
            # A remote judge is asked through one worker alone, or its limit of concurrency would not hold.
            worker = self._workers[0 if reward.remote else number % len(self._workers)]
            asked.append(([place for place, _ in chunk], worker.ask(label, [text for _, text in chunk], seconds)))
        return [(label, places, promised) for places, promised in asked]

    def _wait(self, promised: Future[list[Outcome]]) -> list[Outcome]:
        while not wait([promised], timeout=CHECK_SECONDS).done:
            self._check()
        return promised.result()

    def _stop_if_too_many(self, found: Sequence[Mapping[str, Outcome]]) -> None:
        for label, failures in self._failures.items():
            given = [outcomes[label] for outcomes in found if label in outcomes]
            failures.add(outcome.text if isinstance(outcome, Failure) else None for outcome in given)
            if failures.too_many is not None:
                raise ScoringError(f"reward {label} {failures.too_many}")


class _Worker:
    """One thread that keeps one process going, and asks it in order."""

    def __init__(
        self, number: int, rewards: Sequence[RewardSettings], folders: Sequence[Path], troubles: Troubles
    ) -> None:
        self._name = f"reward worker {number}"
        self._rewards = rewards
        self._folders = folders
        self._troubles = troubles
        self._stopping = Event()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=self._name)
        self._process: WorkerProcess | None = None

    def ask(self, label: str, transcripts: Sequence[str], seconds: float) -> Future[list[Outcome]]:
        """Outcomes to come; the deadline runs from when the process is asked."""
        return self._pool.submit(self._outcomes, label, transcripts, seconds)

    def shutdown(self) -> None:
        """Give up what is under way, and end the process."""
        self._stopping.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._end_process()

    def _outcomes(self, label: str, transcripts: Sequence[str], seconds: float) -> list[Outcome]:
        try:
            request = frame({"op": "score", "reward": label, "transcripts": list(transcripts)})
        except ValueError as error:  # each may be sent, but not all of them together
            return [Failure(f"its transcript cannot be sent to a worker process: {error}")] * len(transcripts)
        failure = ""
        for _ in range(2):
            try:
                answer = self._running().ask(request, seconds)
            except LateError:
                self._end_process()
                failure = f"no answer within {seconds:g} s"
                break
            except DiedError as died:
                self._end_process()
                failure = f"{died}, twice"
                continue
            if "failure" in answer:  # what it gave or raised cannot even be told
                failure = answer["failure"]
                break
            return [outcome_from_json(fields) for fields in answer["outcomes"]]
        return [Failure(failure)] * len(transcripts)

    def _running(self) -> WorkerProcess:
        if self._process is None:
            process = self._process = WorkerProcess(
                self._name, self._stopping, self._troubles, module="mrlm_cli.rewards.worker"
            )
            rewards = {
                settings.label: {"type": settings.type, "config": settings.model_dump_json()}
                for settings in self._rewards
            }
            try:
                process.initialise(self._folders, rewards=rewards)
            except MrlmError:
                self._end_process()
                raise
        return self._process

    def _end_process(self) -> None:
        if self._process is not None:
            self._process.kill()
        self._process = None


def _sendable(transcript: Transcript) -> str | Failure:
    """The transcript as text, or why it cannot be sent to a worker process."""
    try:
        text = json.dumps(transcript_to_json(transcript), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        return Failure(f"its transcript cannot be sent to a worker process: {error}")
    if len(text) > LONGEST:
        return Failure(f"its transcript of {len(text) / 2**20:.0f} MiB is too long to be sent to a worker process")
    return text


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()

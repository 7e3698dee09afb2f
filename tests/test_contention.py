"""Warning of neighbours on the run's cores, with the clock and the kernel's counters in our hands."""

from __future__ import annotations

import json
import os
import threading
from itertools import pairwise
from pathlib import Path

import pytest

from mrlm_cli.training.contention import SHARE, SILENCE, WINDOW, Contention, waited_for_a_core
from mrlm_cli.training.rundir import RunDirectory
from mrlm_cli.training.warned import KeptWarnings


class Machine:
    """Seconds on the clock, and seconds that each thread has waited for a core."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.threads = {1: 5.0, 2: 7.0}  # from before the run: counts for nothing

    def step(self, seconds: float, *waited: float) -> None:
        self.now += seconds
        for thread, more in enumerate(waited, start=1):
            self.threads[thread] = self.threads.get(thread, 0.0) + more


def watched(threads: int = 2) -> tuple[Machine, Contention]:
    machine = Machine()
    return machine, Contention(threads, lambda: dict(machine.threads), lambda: machine.now)


def test_a_step_that_is_long_for_honest_reasons_raises_no_alarm() -> None:
    machine, contention = watched()
    for seconds in (1.0, 3.0, 400.0, 2.0, 4000.0):
        machine.step(seconds, 0.02 * seconds, 0.05 * seconds)
        assert contention.look() is None


def test_threads_that_wait_for_a_core_are_told_of_with_what_to_do() -> None:
    machine, contention = watched()
    machine.step(WINDOW, 0.0, 0.6 * WINDOW)
    said = contention.look()
    assert said is not None
    assert "of the last 10 s its threads waited 6 s" in said
    assert "hardware.threads=1" in said


def test_one_thread_cannot_be_fewer() -> None:
    machine, contention = watched(1)
    machine.step(WINDOW, 0.5 * WINDOW)
    assert "hardware.threads" not in (contention.look() or "hardware.threads")


def test_a_burst_is_judged_with_what_is_around_it() -> None:
    machine, contention = watched()
    machine.step(0.1 * WINDOW, 0.1 * WINDOW)
    assert contention.look() is None
    machine.step(0.9 * WINDOW, 0.0)
    assert contention.look() is None  # a tenth of the window


def test_new_and_ended_threads_count_for_what_they_waited() -> None:
    machine, contention = watched()
    del machine.threads[1]
    machine.step(WINDOW)
    machine.threads[3] = (SHARE + 0.01) * WINDOW
    assert contention.look() is not None


def test_warnings_are_rare_but_come_back() -> None:
    machine, contention = watched()
    told = []
    for _ in range(int(2.5 * SILENCE / WINDOW)):
        machine.step(WINDOW, WINDOW)
        if contention.look():
            told.append(machine.now)
    assert len(told) == 3
    assert all(later - earlier >= SILENCE for earlier, later in pairwise(told))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the kernel counts this only on Linux")
def test_the_kernel_knows_every_thread_of_this_process(tmp_path: Path) -> None:
    if waited_for_a_core():  # kernels may be built without the counters
        assert {threading.get_native_id(), os.getpid()} <= waited_for_a_core().keys()
    (tmp_path / "77").mkdir()
    (tmp_path / "77" / "schedstat").write_text("123 2500000000 4\n")
    assert waited_for_a_core(tmp_path) == {77: 2.5}


def test_warnings_are_kept_those_before_the_directory_too(tmp_path: Path) -> None:
    kept = KeptWarnings(RunDirectory(tmp_path / "run"))
    kept.warned("early")
    run = RunDirectory.create(tmp_path / "run", recipe_yaml="", origins={}, machine={})
    kept.started(run.path, None, 0, 0)
    kept.warned("late")
    rows = [json.loads(line) for line in (run.path / "warnings.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["early", "late"]
    assert all(row["time"].endswith("+00:00") for row in rows)

"""The clock that rests while something is started."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pytest

from mrlm_cli.envs import starting as module
from mrlm_cli.envs.starting import Deadline, starting, tell_parent, working_time


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    monkeypatch.setattr(module, "_here", module._Here())
    return made


def test_a_deadline_rests_while_something_starts_and_no_longer_than_told(clock: Clock) -> None:
    deadline = Deadline(10.0)
    clock.now += 4
    assert deadline.left() == 6
    for seconds in (30, 50):  # however long it took
        assert deadline.heeds({"starting": 60.0})
        clock.now += seconds
        assert deadline.left() > 0
        assert deadline.heeds({"started": True})
        assert deadline.left() == 6
    clock.now += 6
    assert deadline.left() == 0
    deadline = Deadline(1000.0)
    deadline.heeds({"starting": 20.0})
    clock.now += 20.0
    assert deadline.left() == 5  # in which whoever starts it can say that it was late
    clock.now += 5
    assert deadline.left() == 0


def test_an_answer_is_not_for_the_clock(clock: Clock) -> None:
    deadline = Deadline(10.0)
    assert not deadline.heeds({"turns": []})
    assert not deadline.heeds({"started": True})  # nothing was starting
    assert deadline.left() == 10


def test_a_start_is_told_whatever_becomes_of_it_and_leaves_the_working_time_alone(clock: Clock) -> None:
    told: list[Mapping[str, Any]] = []
    tell_parent(told.append)
    clock.now += 1
    begun = working_time()
    with suppress(OSError), starting(7.0):
        clock.now += 5
        raise OSError
    assert told == [{"starting": 7.0}, {"started": True}]
    assert working_time() == begun
    clock.now += 2
    assert working_time() == begun + 2

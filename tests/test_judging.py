"""The numbers of the benchmarks that train: pooled over runs, and paired by task."""

from __future__ import annotations

import pytest

from tests.benchmarks.judging import difference, pooled


def test_runs_are_pooled_and_gains_are_paired_by_task() -> None:
    before = {"a": 1.0, "b": 0.0, "c": 0.0, "d": 0.0}
    after = [{"d": 0.0, "c": 1.0, "b": 1.0, "a": 1.0}, {"a": 0.0, "b": 1.0, "c": 1.0, "d": 0.0}]
    assert pooled(after).mean == pytest.approx(5 / 8)
    assert pooled([before]).mean == pytest.approx(1 / 4)
    assert difference(after, before).mean == pytest.approx(3 / 8)


def test_what_differs_between_tasks_alone_widens_no_paired_interval() -> None:
    before = {str(task): float(task % 2) for task in range(200)}
    after = {task: 0.5 + 0.5 * right for task, right in before.items()}
    lifted = {task: right + 0.25 for task, right in before.items()}
    assert difference([lifted], before).low == difference([lifted], before).high == 0.25
    uneven = difference([after], before)
    assert (uneven.low, uneven.high) != (0.25, 0.25)
    assert pooled([before]).high - pooled([before]).low == pytest.approx(2 * 1.96 * 0.5 / 200**0.5, rel=0.1)

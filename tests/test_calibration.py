"""A run as its own yardstick: steps that are slow for the same work are told of, those that do more are not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mrlm_cli.events import Listener
from mrlm_cli.training import loop
from mrlm_cli.training.calibration import ALIKE, ENOUGH, KEPT, LOST, SLOWER, Calibration, Phase, phases
from mrlm_cli.training.loop import run
from mrlm_cli.training.stopping import Stopper
from tests.kit import tiny, trainer

WORK = (1000, 16, 3000)


def update(seconds: float, work: tuple[int, ...] = WORK) -> Phase:
    return Phase("update", seconds, work)


def told(calibration: Calibration, *done: Phase) -> list[str | None]:
    return [calibration.look(number, [each]) for number, each in enumerate(done, start=1)]


def calibrated(seconds: float = 1.0, threads: int = 2) -> Calibration:
    calibration = Calibration(threads)
    assert told(calibration, *[update(seconds)] * ENOUGH) == [None] * ENOUGH
    return calibration


def test_a_slow_step_is_told_of_with_both_figures_and_what_to_do() -> None:
    said = calibrated().look(41, [update(3.5)])
    assert said is not None
    assert said.startswith("step 41: the update took 3.5 s, 3.5 times the 1 s of this run's earlier steps")
    assert "hardware.threads=1" in said
    assert "hardware.threads" not in (calibrated(threads=1).look(41, [update(3.5)]) or "hardware.threads")


def test_it_is_told_once_and_again_only_after_a_step_that_was_not_slow() -> None:
    calibration = calibrated()
    said = told(calibration, *[update(3.5)] * 200, update(1.1), update(3.5), update(3.5))
    assert [number for number, text in enumerate(said) if text] == [0, 201]


def test_slow_steps_are_no_yardstick() -> None:
    calibration = calibrated()
    told(calibration, *[update(10.0)] * (2 * KEPT), update(1.0))
    assert "2.5 times the 1 s" in str(told(calibration, update(2.5), update(2.5))[1])


def test_short_steps_are_told_of_once_their_series_has_cost_enough() -> None:
    calibration = calibrated(0.1)
    said = told(calibration, *[update(0.2)] * 100)
    first = next(number for number, text in enumerate(said, start=1) if text)
    assert first == pytest.approx(LOST / 0.1, abs=1)
    calibration = calibrated(0.1)
    assert not any(told(calibration, *[update(0.2)] * 15, update(0.1), *[update(0.2)] * 15))


def test_the_first_steps_say_nothing_however_they_vary() -> None:
    assert not any(told(Calibration(2), *[update(float(seconds)) for seconds in (30, 1, 1, 20, 1)]))


def test_phases_have_yardsticks_of_their_own() -> None:
    calibration = calibrated()
    assert not any(told(calibration, *[Phase("sampling", 50.0, WORK)] * 20))
    said = calibration.look(9, [Phase("sampling", 190.0, WORK), update(9.0)])
    assert said is not None
    assert "the sampling took 1.9e+02 s, 3.8 times the 50 s and the update took 9 s, 9.0 times the 1 s of this" in said
    assert not calibration.look(10, [Phase("sampling", 50.0, WORK), update(9.0)])  # the same series
    assert not calibration.look(11, [Phase("sampling", 50.0, WORK), update(1.0)])
    assert calibration.look(12, [Phase("sampling", 50.0, WORK), update(9.0)])


@given(
    st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 200)), min_size=30, max_size=120),
    st.floats(0.001, 0.1),
    st.floats(0, 0.01),
    st.floats(0, 0.001),
)
def test_more_work_is_no_reason_even_where_its_cost_grows_with_the_square(
    sizes: list[tuple[int, int]], token: float, longest: float, square: float
) -> None:
    calibration = Calibration(2)
    for step, (tokens, length) in enumerate(sizes):
        seconds = token * tokens + longest * length + square * tokens * length
        assert calibration.look(step, [update(seconds, (tokens, length, 2 * tokens))]) is None


def test_the_margin_covers_what_counts_as_the_same_work() -> None:
    assert ALIKE**2 < SLOWER < 2  # one neighbour of equal right on the only core makes a step last twice as long


def test_phases_hold_what_was_computed() -> None:
    episodes = [
        SimpleNamespace(tokens=(1,) * 9, chosen=(5, 6, 7), stop="done", left_out=None),
        SimpleNamespace(tokens=(1,) * 7, chosen=(5,), stop="done", left_out="all episodes have the same reward"),
    ]
    assert phases(episodes, 2.0, 3.0, 4, value_only=False) == [  # type: ignore[arg-type]
        Phase("sampling", 2.0, (4, 3, 16)),
        Phase("update", 3.0, (4, 9, 9, 9)),
    ]
    assert phases(episodes, 0.0, 3.0, 4, value_only=True) == [Phase("value update", 3.0, (4, 9, 9, 9))]  # type: ignore[arg-type]
    assert phases(episodes, 0.0, 3.0, 0, value_only=False) == []  # type: ignore[arg-type]


class Heard(Listener):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warned(self, text: str) -> None:
        self.warnings.append(text)


def test_a_run_tells_it_and_no_bit_of_the_training_depends_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny(tmp_path, steps=ENOUGH + 2)
    weights = []
    for name, slow in (("quiet", False), ("slow", True)):
        seen: list[Phase] = []

        def measured(*given: object, slow: bool = slow, seen: list[Phase] = seen) -> list[Phase]:
            done = phases(*given)  # type: ignore[arg-type]
            seen += done
            late = slow and len(seen) > 2 * ENOUGH
            return [Phase(each.name, 60.0 if late else 0.01, (1,)) for each in done]

        monkeypatch.setattr(loop, "phases", measured)
        heard = Heard()
        with trainer(tmp_path / name, recipe, heard) as made:
            run(made, Stopper())
            weights.append({key: value.clone() for key, value in made.policy.state_dict().items()})
        assert [each.name for each in seen] == ["sampling", "update"] * recipe.steps
        assert all(0 < each.seconds < 30 and min(each.work) > 0 for each in seen)
        assert [text for text in heard.warnings if "times the" in text] == ([heard.warnings[-1]] if slow else []), (
            heard.warnings
        )
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())

"""How many people come when."""

from __future__ import annotations

import pytest

from loadtests.shapes import FEWEST, SHAPES, people

PEAK = 40


def over_time(shape: str) -> list[int]:
    """At each hundredth of the time."""
    return [people(shape, PEAK, step / 100) for step in range(101)]


@pytest.mark.parametrize("shape", SHAPES)
def test_somebody_is_always_there(shape: str) -> None:
    assert min(over_time(shape)) >= FEWEST
    assert people(shape, 1, 0.5) >= FEWEST


def test_a_day_has_two_peaks_and_a_lunch_between() -> None:
    day = over_time("day")
    assert max(day) == PEAK
    assert day[30] == day[70] == PEAK
    assert day[51] == PEAK / 2
    assert day[0] == day[100] == PEAK / 10
    assert day[:20] == sorted(day[:20])


def test_a_spike_comes_at_once_and_goes() -> None:
    spike = over_time("spike")
    assert spike[33] == 5 * spike[29] == PEAK
    assert spike[63] == spike[100] == spike[0]


def test_a_soak_stays_the_same() -> None:
    assert set(over_time("soak")[5:96]) == {round(0.7 * PEAK)}


def test_an_overload_is_four_times_a_days_peak_and_then_less() -> None:
    overload = over_time("overload")
    assert max(overload) == 4 * PEAK
    assert overload[80] == overload[100] == PEAK / 2

"""The rate and the time left that long work shows."""

import math
import random
from collections.abc import Callable, Iterator

import pytest

from vocabext.progress import MOMENTS, Pace

UNITS = 3_000


def times(cost: Callable[[int], float]) -> Iterator[tuple[float, float]]:
    """Do uneven work by a clock of its own; yield the time left that was predicted, and the true one, along the way."""
    now = 100.0
    pace = Pace(UNITS, lambda: now)
    end = now + sum(map(cost, range(UNITS)))
    for unit in range(UNITS - 1):
        now += cost(unit)
        pace.advance(1)
        if UNITS / 3 <= unit <= 0.9 * UNITS:
            assert pace.seconds_left is not None
            yield pace.seconds_left, end - now


@pytest.mark.parametrize(("kind", "cost"), [
    ("even", lambda unit: 0.01),
    ("a slow start", lambda unit: 2.0 if unit < 30 else 0.01),
    ("slow and fast stretches in turn", lambda unit: 0.1 if unit % 60 < 20 else 0.01),
    ("units of all sizes", lambda unit: math.exp(random.Random(unit).gauss(0, 1))),
])
def test_the_time_left_is_right_within_a_fifth_from_one_third_on(kind: str, cost: Callable[[int], float]) -> None:
    wrong = [abs(predicted / true - 1) for predicted, true in times(cost)]
    assert max(wrong) < 0.2


def test_skipped_work_changes_the_time_left_and_not_the_rate() -> None:
    now = 0.0
    pace = Pace(1_000, lambda: now)
    for _ in range(40):
        now += 1.0
        pace.advance(10)
    assert (pace.rate, pace.seconds_left) == (pytest.approx(10), pytest.approx(60))
    pace.skip(300)
    assert (pace.rate, pace.seconds_left) == (pytest.approx(10), pytest.approx(30))
    assert (pace.done, pace.total) == (400, 700)


def test_nothing_is_promised_where_nothing_is_known_or_left() -> None:
    now = 0.0
    pace = Pace(2, lambda: now)
    now = 5.0
    assert (pace.rate, pace.seconds_left) == (0.0, None)
    pace.advance(2)
    assert (pace.rate, pace.seconds_left) == (0.4, None)
    assert Pace(None).seconds_left is None


def test_work_that_stands_still_has_more_and_more_time_left() -> None:
    now = 0.0
    pace = Pace(100, lambda: now)
    left = []
    for now in (10.0, 20.0, 200.0):
        pace.advance(10 if now < 200 else 0)
        left.append(pace.seconds_left)
    assert left == [90.0, 80.0, 1_520.0]  # the later ten units took 190 seconds


def test_a_pace_forgets_moments_and_keeps_its_start() -> None:
    now = 0.0
    pace = Pace(None, lambda: now)
    for _ in range(10 * MOMENTS):
        now += 0.5
        pace.advance(1)
    assert len(pace._counts) <= 2 * MOMENTS
    assert (pace.rate, pace.seconds) == (pytest.approx(2.0), 5.0 * MOMENTS)

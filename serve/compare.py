"""Is one server faster than the other, or is it noise?

Every round measures base, expanded and base again on the same requests. From a round come two ratios:

    speed-up   sqrt(first base * second base) / expanded    > 1: expanded is faster
    noise      first base / second base                     1 apart from chance

The square root puts the base in the middle of the round, so that a machine that slowly warms up or
gets busy cancels out of the speed-up. Intervals come from a bootstrap over rounds (another day) and
over requests (other texts). The noise floor is how far the base is from itself: a verdict is given
only if the whole interval of the speed-up lies outside.

Costs are seconds per unit of *text* (per text, per character), never per token: the two tokenizers
do not agree on what a token is.

Shapes: R rounds, Q requests, K resamples.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vocabext.errors import ServerError

Floats = npt.NDArray[np.float64]
FASTER, SLOWER, NO_DIFFERENCE = "faster", "slower", "no difference"
NUM_RESAMPLES = 4000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Series:
    """One server's measurements: what every request of every round took, and how much text it was.

    Attributes:
        seconds_RQ: Seconds per request; NaN where the request failed.
        amount_RQ: Texts (1), or characters, that the request was about.
    """

    seconds_RQ: Floats
    amount_RQ: Floats


@dataclass(frozen=True)
class Comparison:
    """The result of a paired comparison. Intervals are (low, high) at 95 %.

    Attributes:
        base: Median over the rounds of seconds per unit of text, both base runs together.
        base_interval: Its interval.
        expanded: The same for the expanded model.
        expanded_interval: Its interval.
        speedup: Median over the rounds of base / expanded.
        speedup_interval: Its interval.
        noise: Median over the rounds of first base / second base.
        noise_interval: Its interval.
        noise_floor: The widest of the noise interval's ends, as a factor: 1.02 for 2 %.
        verdict: `faster`, `slower` or `no difference`.
        rounds: Seconds per unit of text of each round: first base, expanded, second base.
    """

    base: float
    base_interval: tuple[float, float]
    expanded: float
    expanded_interval: tuple[float, float]
    speedup: float
    speedup_interval: tuple[float, float]
    noise: float
    noise_interval: tuple[float, float]
    noise_floor: float
    verdict: str
    rounds: tuple[tuple[float, float, float], ...]

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as JSON-ready values."""
        return asdict(self)


def compare(first: Series, expanded: Series, second: Series, *, seed: int = 0) -> Comparison:
    """Compare the expanded model with the base.

    A request that failed on any of the three is left out of its round, so that all three are about
    the same texts.

    Args:
        first: The base, before the expanded model.
        expanded: The expanded model.
        second: The base again, after it.
        seed: Seed of the bootstrap.

    Raises:
        ServerError: If a round has no request that succeeded on all three.
    """
    runs = (first, expanded, second)
    ok_RQ = np.all([np.isfinite(s.seconds_RQ) & (s.amount_RQ > 0) for s in runs], axis=0)
    if not ok_RQ.any(axis=1).all():
        bad = int(np.flatnonzero(~ok_RQ.any(axis=1))[0]) + 1
        raise ServerError(f"no request of round {bad} succeeded on both servers; see their logs")
    num_rounds, num_requests = ok_RQ.shape
    resample = _resample(num_rounds, num_requests, np.random.default_rng(seed))
    costs = np.log(_costs(runs, ok_RQ, _everything(num_rounds, num_requests)))[0]  # (R, 3)
    resampled = np.log(_costs(runs, ok_RQ, resample))  # (K, R, 3)
    speedup, speedup_interval = _estimate(_speedup(costs), _speedup(resampled))
    noise, noise_interval = _estimate(_noise(costs), _noise(resampled))
    base, base_interval = _estimate(_middle(costs), _middle(resampled))
    cost, cost_interval = _estimate(costs[..., 1], resampled[..., 1])
    floor = max(noise_interval[1], 1 / noise_interval[0])
    return Comparison(base, base_interval, cost, cost_interval, speedup, speedup_interval, noise, noise_interval,
                      floor, verdict(speedup_interval, floor),
                      tuple((float(a), float(e), float(b)) for a, e, b in np.exp(costs)))


def verdict(speedup_interval: tuple[float, float], noise_floor: float) -> str:
    """Say what may be said: a difference only if its whole interval is outside the noise floor.

    Args:
        speedup_interval: Low and high end of the speed-up.
        noise_floor: A factor of at least 1; the noise reaches from `1 / noise_floor` to `noise_floor`.
    """
    low, high = speedup_interval
    if low > noise_floor:
        return FASTER
    return SLOWER if high < 1 / noise_floor else NO_DIFFERENCE


def _middle(log_costs: Floats) -> Floats:
    return (log_costs[..., 0] + log_costs[..., 2]) / 2


def _speedup(log_costs: Floats) -> Floats:
    return _middle(log_costs) - log_costs[..., 1]


def _noise(log_costs: Floats) -> Floats:
    return log_costs[..., 0] - log_costs[..., 2]


def _estimate(log_R: Floats, log_KR: Floats) -> tuple[float, tuple[float, float]]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.median(log_KR, axis=1), (tail, 1 - tail))
    return float(np.exp(np.median(log_R))), (float(np.exp(low)), float(np.exp(high)))


def _everything(num_rounds: int, num_requests: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    return np.arange(num_rounds)[None], np.ones((1, num_requests), np.int64)


def _resample(
    num_rounds: int, num_requests: int, random: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Draw rounds, shape (K, R), and how often each request counts, shape (K, Q)."""
    rounds_KR = random.integers(num_rounds, size=(NUM_RESAMPLES, num_rounds))
    drawn_KQ = random.integers(num_requests, size=(NUM_RESAMPLES, num_requests))
    counts_KQ = (drawn_KQ[..., None] == np.arange(num_requests)).sum(axis=1)
    return rounds_KR, counts_KQ


def _costs(
    runs: tuple[Series, ...], ok_RQ: npt.NDArray[np.bool_], sample: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
) -> Floats:
    """Return seconds per unit of text for each resample, drawn round and run, shape (K, R, runs)."""
    rounds_KR, counts_KQ = sample
    # Where requests failed, a resample may miss all that are left of a round: it then counts the round whole.
    empty_KR = counts_KQ @ ok_RQ.T == 0
    columns = []
    for run in runs:
        seconds_RQ = np.where(ok_RQ, run.seconds_RQ, 0.0)
        amount_RQ = np.where(ok_RQ, run.amount_RQ, 0.0)
        seconds_KR = np.where(empty_KR, seconds_RQ.sum(axis=1), counts_KQ @ seconds_RQ.T)
        amount_KR = np.where(empty_KR, amount_RQ.sum(axis=1), counts_KQ @ amount_RQ.T)
        columns.append(np.take_along_axis(seconds_KR / amount_KR, rounds_KR, axis=1))
    return np.stack(columns, axis=-1)

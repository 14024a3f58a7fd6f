"""Is one server faster than the other, or is it noise?

Every round sends the same requests to base, to expanded and to base again. Each request is compared with
itself, which gives two ratios:

    speed-up   sqrt(first base * second base) / expanded    > 1: expanded is faster
    noise      first base / second base                     1 apart from chance

The square root puts the base in the middle of the round, so that a machine that slowly warms up or gets busy cancels
out of the speed-up. Reported is the median over the requests of all rounds: a few requests that something else slowed
down do not move it. Intervals come from a bootstrap over rounds (another day) and over requests (other texts). The
noise floor is how far the base is from itself. The verdict is `faster` or `slower` only if the whole interval of the
speed-up lies outside the noise floor, from five rounds on; where the floor is above `NOISY`, it is `too noisy`.

Costs are seconds per unit of *text* (per text, per character), never per token: a token is another amount of text in
each of the two tokenizers.

Shapes: R rounds, Q requests, K resamples.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vocabext.errors import ServerError

Floats = npt.NDArray[np.float64]
FASTER, SLOWER, NO_DIFFERENCE = "faster", "slower", "no difference"
TOO_NOISY, TOO_FEW = "too noisy to tell", "too few rounds"
MIN_ROUNDS = 5  # fewer give no interval worth the name
NOISY = 1.25  # a base that differs from itself by this factor hides every speed-up worth having
NUM_RESAMPLES = 3000
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
        base: Median over the requests of seconds per unit of text, both base passes together.
        base_interval: Its interval.
        expanded: The same for the expanded model.
        expanded_interval: Its interval.
        speedup: Median over the requests of base / expanded.
        speedup_interval: Its interval.
        noise: Median over the requests of first base / second base.
        noise_interval: Its interval.
        noise_floor: The widest of the noise interval's ends, as a factor: 1.02 for 2 %.
        verdict: `faster`, `slower`, `no difference`, `too noisy to tell` or `too few rounds`.
        rounds: Median seconds per unit of text in each round: first base, expanded, second base.
        lost_rounds: Rounds in which no request succeeded on all three; they are left out.
        left_out: Requests left out of all three because they failed on one, in the rounds that count.
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
    lost_rounds: int = 0
    left_out: int = 0


def compare(first: Series, expanded: Series, second: Series, *, seed: int = 0) -> Comparison:
    """Compare the expanded model with the base before it (`first`) and after it (`second`).

    A request that failed on any of the three is left out of its round, so that all three are about the same texts.

    Raises:
        ServerError: If no round has a request that succeeded on all three.
    """
    logs = np.log([_costs(series) for series in (first, expanded, second)])  # (3, R, Q)
    logs[:, np.isnan(logs).any(axis=0)] = np.nan
    empty = np.isnan(logs[0]).all(axis=1)
    if empty.all():
        raise ServerError("no request of any round succeeded on both servers; see their logs")
    logs = logs[:, ~empty]
    middle = (logs[0] + logs[2]) / 2
    generator = np.random.default_rng(seed)
    rounds_KR = generator.integers(logs.shape[1], size=(NUM_RESAMPLES, logs.shape[1]))
    requests_KQ = generator.integers(logs.shape[2], size=(NUM_RESAMPLES, logs.shape[2]))

    def estimate(log_RQ: Floats) -> tuple[float, tuple[float, float]]:
        drawn = log_RQ[rounds_KR[:, :, None], requests_KQ[:, None, :]].reshape(NUM_RESAMPLES, -1)
        drawn = drawn[~np.isnan(drawn).all(axis=1)]  # where many requests failed, a draw may hold nothing
        tail = (1 - CONFIDENCE) / 2
        low, high = np.exp(np.quantile(np.nanmedian(drawn, axis=1), (tail, 1 - tail)))
        return float(np.exp(np.nanmedian(log_RQ))), (float(low), float(high))

    speedup, speedup_interval = estimate(middle - logs[1])
    noise, noise_interval = estimate(logs[0] - logs[2])
    base, base_interval = estimate(middle)
    cost, cost_interval = estimate(logs[1])
    floor = max(noise_interval[1], 1 / noise_interval[0])
    rounds = tuple((float(a), float(e), float(b)) for a, e, b in np.exp(np.nanmedian(logs, axis=2)).T)
    return Comparison(base, base_interval, cost, cost_interval, speedup, speedup_interval, noise, noise_interval,
                      floor, verdict(speedup_interval, floor, logs.shape[1]), rounds,
                      lost_rounds=int(empty.sum()), left_out=int(np.isnan(logs[0]).sum()))


def verdict(speedup_interval: tuple[float, float], noise_floor: float, num_rounds: int = MIN_ROUNDS) -> str:
    """Judge a speed-up by its interval, and the noise, which reaches from `1 / noise_floor` to `noise_floor`."""
    low, high = speedup_interval
    if num_rounds < MIN_ROUNDS:
        return TOO_FEW
    if low > noise_floor:
        return FASTER
    if high < 1 / noise_floor:
        return SLOWER
    return TOO_NOISY if noise_floor > NOISY else NO_DIFFERENCE


def _costs(series: Series) -> Floats:
    """Return seconds per unit of text of each request, shape (R, Q); NaN where it failed or wrote nothing."""
    amount_RQ = np.where(series.amount_RQ > 0, series.amount_RQ, np.nan)
    return np.asarray(series.seconds_RQ / amount_RQ, dtype=np.float64)

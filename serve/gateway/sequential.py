"""Confidence sequences: intervals for a mean that hold at all times at once.

A canary looks after every answer. An ordinary 95 % interval that is looked at a thousand times excludes the
truth at some time almost surely; a confidence sequence at level alpha excludes it at any time, ever, with
probability alpha at most. So one may stop whenever one likes, and for any reason.

Sources:
    BoundedMean   the predictable plug-in empirical Bernstein sequence: Waudby-Smith and Ramdas, "Estimating means
                  of bounded random variables by betting", JRSS B 86 (2024), theorem 2. Exact for any
                  distribution on [0, 1].
    Mean          the asymptotic sequence of Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, "Time-uniform
                  central limit theory and asymptotic confidence sequences", Annals of Statistics 52 (2024),
                  theorem 2.2: Robbins' normal mixture with the variance estimated. Approximate, as a t test is, so
                  it says nothing before `BURN_IN` values.
"""

import math
from typing import Protocol

BURN_IN = 30
TIGHTEST_AT = 250  # number of values at which the asymptotic sequence is made to be narrowest
_MAX_BET = 0.5


class ConfidenceSequence(Protocol):
    """A running mean with limits."""

    count: int

    def add(self, value: float) -> None:
        """Take one more value into account."""

    @property
    def mean(self) -> float:
        """The mean so far."""

    def limits(self, alpha: float) -> tuple[float, float]:
        """Return limits that at all times hold the true mean, but for probability `alpha`."""


class BoundedMean:
    """The mean of values from 0 to 1, such as failures.

    The bets are tuned to one `alpha`, so it is given in advance.
    """

    def __init__(self, alpha: float) -> None:
        """Start without values.

        Args:
            alpha: Probability that the limits ever fail, both sides together.
        """
        self.count = 0
        self._alpha = alpha
        self._sum = self._squares = 0.0  # of the values, of their distances from the mean before them
        self._bets = self._bets_values = self._price = 0.0

    @property
    def mean(self) -> float:
        """The mean so far; 0 without values."""
        return self._sum / self.count if self.count else 0.0

    def add(self, value: float) -> None:
        """Take one more value into account."""
        assert 0 <= value <= 1, value
        before, n = (0.5 + self._sum) / (self.count + 1), self.count + 1
        variance = (0.25 + self._squares) / n
        bet = min(_MAX_BET, math.sqrt(2 * math.log(2 / self._alpha) / (variance * n * math.log(1 + n))))
        self._bets += bet
        self._bets_values += bet * value
        self._price += (value - before) ** 2 * (-math.log(1 - bet) - bet)
        self.count, self._sum = n, self._sum + value
        self._squares += (value - (0.5 + self._sum) / (n + 1)) ** 2

    def limits(self, alpha: float) -> tuple[float, float]:
        """Return the limits at the level given in advance."""
        assert alpha == self._alpha
        if not self.count:
            return 0.0, 1.0
        centre = self._bets_values / self._bets
        width = (math.log(2 / alpha) + self._price) / self._bets
        return max(0.0, centre - width), min(1.0, centre + width)


class Mean:
    """The mean of any values with a variance, such as logarithms of seconds."""

    def __init__(self) -> None:
        """Start without values."""
        self.count = 0
        self.mean = 0.0
        self._squares = 0.0

    def add(self, value: float) -> None:
        """Take one more value into account (Welford's update)."""
        self.count += 1
        step = value - self.mean
        self.mean += step / self.count
        self._squares += step * (value - self.mean)

    def limits(self, alpha: float) -> tuple[float, float]:
        """Return limits that at all times hold the true mean, but for probability `alpha` (asymptotically)."""
        if self.count < BURN_IN:
            return -math.inf, math.inf
        n, variance = self.count, self._squares / (self.count - 1)
        rho2 = (-2 * math.log(alpha) + math.log(-2 * math.log(alpha)) + 1) / TIGHTEST_AT
        scale = n * rho2 + 1
        width = math.sqrt(variance * 2 * scale / (n * n * rho2) * math.log(math.sqrt(scale) / alpha))
        return self.mean - width, self.mean + width

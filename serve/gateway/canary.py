"""The canary: both arms compared while they serve, and a rule that ends the trial.

Each measure has a bound that the operator states. The expanded arm is called worse only once a confidence
sequence (sequential.py) lies beyond the bound as a whole: not if it is slower in the sample, but if it is
slower than the bound allows, with an error probability of `alpha` over all measures and all times together.
A trial begins anew with every change of the policy.

What is compared: failures, seconds per character, seconds to the first character, characters per answer,
for requests at temperature 0 that both arms answered, how far the two texts agree, and for all that both
answered, how much less likely the expanded model finds the base's answer behind its own reading of the prompt
than behind the base's (reading.py). Seconds per request are reported, not judged: `max_tokens` counts tokens,
so the same number means more text on the expanded arm. Seconds per character and to the first one are judged
where both arms bore like loads (load.py), and reported for all answers.

A request that an engine refuses is a failure of its arm in the comparison: clients' mistakes are divided by
chance between the arms, so they cancel. The same holds for clients that leave before the answer begins, when they
cannot know the arm: their number is theirs to choose, so it counts against an arm only where the other one answers. An
arm that is given up without a comparison must have failed itself.
"""

import math
from dataclasses import dataclass
from typing import Any

from vocabext.errors import UsageError
from vocabext.serve.gateway.arms import ARMS, BASE, EXPANDED
from vocabext.serve.gateway.observe import Observation
from vocabext.serve.gateway.sequential import BoundedMean, ConfidenceSequence, Mean

FAILURES, PACE, FIRST, LENGTH, AGREEMENT, READING = (
    "failures", "seconds per character", "seconds to the first character", "characters per answer", "agreement",
    "nats lost per character of the base's answer")
MEASURES = (FAILURES, PACE, FIRST, LENGTH, AGREEMENT, READING)
ALWAYS_BROKEN = 0.5  # an arm that fails more often than this is given up without anything to compare it with


@dataclass(frozen=True)
class Bounds:
    """How much worse the expanded arm may be.

    Attributes:
        failure_share: Its share of failed answers may be this much above the base's.
        pace_ratio: Its seconds per character may be this many times the base's.
        first_ratio: Its seconds to the first character may be this many times the base's.
        length_ratio: Its answers may be this many times as long, or as short.
        min_agreement: Share of a greedy answer, from its beginning, that must be the base's on average.
        reading_nats: Behind prompts as it reads them, it may find the base's answers less likely by so many nats
            per character on average than behind prompts as the base reads them.
        alpha: Probability of a rollback without reason, over all measures and all times together.
    """

    failure_share: float = 0.02
    pace_ratio: float = 1.25
    first_ratio: float = 1.5
    length_ratio: float = 2.0
    min_agreement: float = 0.1
    reading_nats: float = 0.03
    alpha: float = 0.01

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, value, low, high in (
            ("failure share", self.failure_share, 0, 1), ("pace ratio", self.pace_ratio, 1, math.inf),
            ("first-character ratio", self.first_ratio, 1, math.inf), ("length ratio", self.length_ratio, 1, math.inf),
            ("least agreement", self.min_agreement, 0, 1), ("reading loss", self.reading_nats, 0, math.inf),
            ("alpha", self.alpha, 1e-9, 0.5),
        ):
            if not low <= value <= high:
                raise UsageError(f"the {name} is {value:g}; it must be from {low:g} to {high:g}")


@dataclass(frozen=True)
class Finding:
    """What is known of one measure.

    Attributes:
        measure: Its name.
        base: The base arm's mean (geometric for seconds and characters); None without values.
        expanded: The expanded arm's.
        low: Lower limit of the difference (failures), the ratio, or the agreement.
        high: Upper limit of it.
        bound: The bound, in the same unit.
        worse: Whether the expanded arm is worse beyond the bound.
        values: Number of values on the base arm and on the expanded one.
    """

    measure: str
    base: float | None
    expanded: float | None
    low: float
    high: float
    bound: float
    worse: bool
    values: tuple[int, int]

    def reason(self) -> str:
        """Say why the expanded arm is worse, with all numbers."""
        n, m = self.values
        if self.measure == READING:
            return (f"it finds the base's answers less likely by {self.expanded or 0:.3f} nats per character in {m} "
                    "pairs, behind prompts as it reads them: "
                    f"at least {self.low:.3f}, the bound is {self.bound:.3f}")
        if self.measure == FAILURES:
            return (f"{self.expanded or 0:.1%} of its {m} answers failed, {self.base or 0:.1%} of {n} on the base arm: "
                    f"at least {self.low:+.1%}, the bound is {self.bound:+.1%}")
        if self.measure == AGREEMENT:
            return (f"its greedy answers agree with the base's over {self.expanded or 0:.1%} of their length in {m} "
                    f"pairs: at most {self.high:.1%}, the bound is {self.bound:.1%}")
        side = f"at least {self.low:.2f}" if self.low > 1 else f"at most {self.high:.2f}"
        return (f"{self.measure} are {self.expanded or 0:.4g}, {self.base or 0:.4g} on the base arm ({m} and {n} "
                f"answers): {side} times, the bound is {self.bound:.2f}")

    def to_json(self) -> dict[str, Any]:
        """Return the finding as JSON-ready values; limits that say nothing yet are None."""
        return {"measure": self.measure, "base": self.base, "expanded": self.expanded,
                "low": self.low if math.isfinite(self.low) else None,
                "high": self.high if math.isfinite(self.high) else None, "bound": self.bound, "worse": self.worse,
                "values": {"base": self.values[0], "expanded": self.values[1]}}


class Canary:
    """Compares the arms."""

    def __init__(self, bounds: Bounds | None = None) -> None:
        """Start a trial."""
        self.bounds = bounds or Bounds()
        self.restart()

    def restart(self) -> None:
        """Forget everything, and start a trial."""
        # Two sequences for each measure share its part of alpha; agreement and reading have one each, and leave room
        # for the one of broken answers.
        self._alpha = self.bounds.alpha / len(MEASURES) / 2
        self._failures: dict[str, ConfidenceSequence] = {arm: BoundedMean(self._alpha) for arm in ARMS}
        self._broken = BoundedMean(self._alpha)  # of the expanded arm
        self._logs: dict[str, dict[str, ConfidenceSequence]] = {
            measure: {arm: Mean() for arm in ARMS} for measure in (PACE, FIRST, LENGTH)}
        self._all = {measure: {arm: Mean() for arm in ARMS} for measure in (PACE, FIRST)}  # under whatever load
        self._seconds = {arm: Mean() for arm in ARMS}
        self._agreement = BoundedMean(self._alpha)
        self._reading: ConfidenceSequence = Mean()

    def add(self, seen: Observation) -> None:
        """Take one answer into account, if it says something about its arm."""
        if not seen.tells:
            return
        self._failures[seen.arm].add(float(seen.failed or seen.refused))
        if seen.arm == EXPANDED and not seen.left:
            self._broken.add(float(seen.failed))
        if not seen.counted:
            return
        self._seconds[seen.arm].add(seen.seconds)
        self._logs[LENGTH][seen.arm].add(math.log1p(seen.characters))
        if seen.characters:
            self._add_time(PACE, seen, seen.seconds / seen.characters)
        if seen.first_text_seconds is not None:
            self._add_time(FIRST, seen, seen.first_text_seconds)

    def _add_time(self, measure: str, seen: Observation, seconds: float) -> None:
        logarithm = math.log(max(seconds, 1e-9))
        self._all[measure][seen.arm].add(logarithm)
        if seen.alike:
            self._logs[measure][seen.arm].add(logarithm)

    def compare(self, one: Observation, another: Observation) -> None:
        """Take two answers to the same greedy request into account, one of each arm."""
        if one.counted and another.counted:
            self._agreement.add(agreement(one.text, another.text))

    def read(self, loss: float) -> None:
        """Take into account how much less likely one reading made an answer of the base, nats per character."""
        self._reading.add(loss)

    def findings(self) -> list[Finding]:
        """Return what is known of each measure."""
        return [self._failures_found(), self._ratio(PACE, self.bounds.pace_ratio),
                self._ratio(FIRST, self.bounds.first_ratio),
                self._ratio(LENGTH, self.bounds.length_ratio, both_ways=True),
                self._agreement_found(), self._reading_found()]

    def reason_to_stop(self) -> str:
        """Return why the expanded arm must be taken back, empty as long as there is no reason."""
        return "; ".join(f"{finding.measure}: {finding.reason()}" for finding in self.findings() if finding.worse)

    def to_json(self) -> dict[str, Any]:
        """Return the trial as JSON-ready values."""
        return {"alpha": self.bounds.alpha, "findings": [finding.to_json() for finding in self.findings()],
                "seconds_per_request": {arm: mean.mean if mean.count else None for arm, mean in self._seconds.items()},
                "under_any_load": {measure: {arm: math.exp(mean.mean) if mean.count else None
                                             for arm, mean in means.items()} for measure, means in self._all.items()}}

    def _failures_found(self) -> Finding:
        base, expanded = self._failures[BASE], self._failures[EXPANDED]
        base_low, base_high = base.limits(self._alpha)
        low, high = expanded.limits(self._alpha)
        broken, _ = self._broken.limits(self._alpha)
        worse = low - base_high > self.bounds.failure_share or broken > max(ALWAYS_BROKEN, self.bounds.failure_share)
        return Finding(FAILURES, base.mean if base.count else None, expanded.mean if expanded.count else None,
                       low - base_high, high - base_low, self.bounds.failure_share, worse,
                       (base.count, expanded.count))

    def _ratio(self, measure: str, bound: float, *, both_ways: bool = False) -> Finding:
        base, expanded = self._logs[measure][BASE], self._logs[measure][EXPANDED]
        base_low, base_high = base.limits(self._alpha)
        low, high = expanded.limits(self._alpha)
        least, most = low - base_high, high - base_low
        worse = least > math.log(bound) or (both_ways and most < -math.log(bound))
        return Finding(measure, math.exp(base.mean) if base.count else None,
                       math.exp(expanded.mean) if expanded.count else None, _exp(least), _exp(most), bound, worse,
                       (base.count, expanded.count))

    def _agreement_found(self) -> Finding:
        found, count = self._agreement, self._agreement.count
        low, high = found.limits(self._alpha)
        return Finding(AGREEMENT, 1.0 if count else None, found.mean if count else None, low, high,
                       self.bounds.min_agreement, high < self.bounds.min_agreement, (count, count))

    def _reading_found(self) -> Finding:
        found, count = self._reading, self._reading.count
        low, high = found.limits(self._alpha)
        return Finding(READING, 0.0 if count else None, found.mean if count else None, low, high,
                       self.bounds.reading_nats, low > self.bounds.reading_nats, (count, count))


def agreement(one: str, another: str) -> float:
    """Return the share of the longer text, from the beginning, that both have in common."""
    longest = max(len(one), len(another))
    if not longest:
        return 1.0
    shortest = min(len(one), len(another))
    common = next((i for i, (a, b) in enumerate(zip(one, another, strict=False)) if a != b), shortest)
    return common / longest


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0)) if value < math.inf else math.inf

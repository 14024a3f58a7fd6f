"""How busy the arms are: who gets a place, and whether the times of an answer may be compared.

Where clients have different keys, none of them holds more than half of an arm's places, nor more than an equal share
among the keys that hold some: whoever floods the gateway leaves places for the others.

A request takes longer in a larger batch. Behind shares of 90 and 10 %, two engines carry different loads, and an arm
that is the same looks several times as slow. So an answer's times are compared only if both arms had about as many
requests in flight while it was made, or hardly any. The numbers are means over the answer's own time: a request that
came into an idle engine just before thirty others did not run alone.

The price: an arm that is so slow that requests pile up on it is not compared while they do. That is said in
docs/guides/canary.md; the alternative, to take as the arm's own doing whatever piles up where shares are equal,
took back identical arms in simulation, because a random gap between two busy engines lasts for hundreds of requests.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vocabext.serve.gateway.answers import Refusal
from vocabext.serve.gateway.arms import ARMS, other
from vocabext.serve.gateway.metrics import Metrics

LIKE = 1.5  # times as many requests on one arm as on the other
FEW = 1.0  # requests beside the one that is looked at


@dataclass(frozen=True)
class Mark:
    """A moment, and what had been in flight until then.

    Attributes:
        when: In seconds.
        busy: Requests in flight, summed over time, by arm.
    """

    when: float
    busy: dict[str, float]


class Loads:
    """Counts what is in flight on each arm.

    Attributes:
        in_flight: Requests that are being answered now, by arm.
    """

    def __init__(self, metrics: Metrics, limit: int, *, clock: Callable[[], float] = time.perf_counter) -> None:
        """Start without requests.

        Args:
            metrics: Shows what is in flight.
            limit: Requests that one arm may have at once.
            clock: Tells the time in seconds.
        """
        self.in_flight = dict.fromkeys(ARMS, 0)
        self._metrics, self._limit = metrics, limit
        self._clock, self._last = clock, clock()
        self._busy = dict.fromkeys(ARMS, 0.0)
        self._of_keys: dict[str, Counter[str]] = {arm: Counter() for arm in ARMS}

    @contextmanager
    def slot(self, arm: str, key: str = "") -> Iterator[Mark]:
        """Hold a place among the requests of an arm; gives the moment since when.

        Args:
            arm: The arm.
            key: Names the client's key; empty where all clients come with the same one, or none.

        Raises:
            Refusal: 503 if all are taken, 429 if the key holds its share.
        """
        busy = self.in_flight[arm]
        if busy >= self._limit:
            raise Refusal(503, f"the {arm} arm has {busy} requests in flight, the limit is {self._limit}; "
                               "try again in a moment", [(b"retry-after", b"1")])
        self._take(arm, key)
        self.begin(arm)
        try:
            yield self.mark()
        finally:
            self.end(arm)
            self._give_back(arm, key)

    def _take(self, arm: str, key: str) -> None:
        """Count a key's request.

        Raises:
            Refusal: 429 if the key holds its share.
        """
        held = self._of_keys[arm]
        if not key:
            return
        others = len(held) - (key in held)
        share = max(1, self._limit // max(2, 1 + others))
        if held[key] >= share:
            raise Refusal(429, f"this key has {held[key]} requests in flight on the {arm} arm, its share is {share} of "
                               f"{self._limit}; try again in a moment", [(b"retry-after", b"1")])
        held[key] += 1

    def _give_back(self, arm: str, key: str) -> None:
        held = self._of_keys[arm]
        if key:
            held[key] -= 1
            if not held[key]:
                del held[key]

    def begin(self, arm: str) -> None:
        """Count a request that is sent to an arm."""
        self._sum_up()
        self.in_flight[arm] += 1
        self._metrics.in_flight.labels(arm).inc()

    def end(self, arm: str) -> None:
        """Count a request that has ended."""
        self._sum_up()
        self.in_flight[arm] -= 1
        self._metrics.in_flight.labels(arm).dec()

    def mark(self) -> Mark:
        """Return where things stand, for `alike` to look back at."""
        self._sum_up()
        return Mark(self._last, dict(self._busy))

    def alike(self, arm: str, since: Mark) -> bool:
        """Tell whether a request that was in flight on an arm since a mark ran under a load that both arms bore."""
        now = self.mark()
        seconds = max(now.when - since.when, 1e-9)
        mean = {name: (now.busy[name] - since.busy[name]) / seconds for name in ARMS}
        beside, there = max(mean[arm] - 1, 0.0), mean[other(arm)]
        most = max(beside, there)
        return most <= FEW or most <= LIKE * min(beside, there)

    def _sum_up(self) -> None:
        now = self._clock()
        for name in ARMS:
            self._busy[name] += self.in_flight[name] * (now - self._last)
        self._last = now

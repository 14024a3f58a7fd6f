"""How a stage tells the outside how far it is, without knowing who listens.

A stage takes `progress: Progress = no_progress` and writes

    with progress("reading the corpus", total, "documents") as task:
        for document in documents:
            ...
            task.advance()

The command line passes `vocabext.cli.show.progress`; a program that calls the stage passes
nothing, or its own. Count in the unit that costs the time (shows, positions, bytes), and often: `Pace` makes the rate
and the time left from these counts.
"""

import time
from bisect import bisect_left
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

# How many moments a pace remembers; when there are twice as many, it forgets every other one.
MOMENTS = 256


class Task(Protocol):
    """One piece of long work that is under way."""

    def advance(self, amount: int = 1, /) -> None:
        """Report that `amount` more units are done."""

    def skip(self, amount: int, /) -> None:
        """Report that `amount` units of the total need not be done."""

    def note(self, text: str, /) -> None:
        """Replace the short remark shown beside the count, such as the loss."""


class Progress(Protocol):
    """Opens a `Task`; it ends with the `with` block."""

    def __call__(
        self, description: str, /, total: int | None = None, unit: str = ""
    ) -> AbstractContextManager[Task]:
        """Start a task.

        Args:
            description: What is being done, such as `"reading the corpus"`.
            total: How many units there are, or None where nobody can know.
            unit: What is counted, in the plural, such as `"documents"`.
        """


class _SilentTask:
    """A task that nobody watches."""

    def advance(self, amount: int = 1, /) -> None:
        """Do nothing."""

    def skip(self, amount: int, /) -> None:
        """Do nothing."""

    def note(self, text: str, /) -> None:
        """Do nothing."""


def no_progress(description: str, /, total: int | None = None, unit: str = "") -> AbstractContextManager[Task]:
    """Start a task that reports nothing: the default of every stage."""
    return nullcontext(_SilentTask())


class Pace:
    """The rate of some work, and the time that the rest of it will take.

    The rate is that of the later half of the work done: a slow start is forgotten, and slow and fast stretches in turn
    are averaged. Units that are skipped change the total, and not the rate.

    Attributes:
        total: How many units there are; None where nobody can know.
        done: How many are done.
    """

    def __init__(self, total: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        """Start the clock."""
        self.total, self.done, self._clock = total, 0, clock
        self._counts, self._times = [0], [clock()]

    def advance(self, amount: int) -> None:
        """Count `amount` units as done now."""
        if not amount:
            return
        self.done += amount
        self._counts.append(self.done)
        self._times.append(self._clock())
        if len(self._counts) > 2 * MOMENTS:
            self._counts, self._times = self._counts[::2], self._times[::2]

    def skip(self, amount: int) -> None:
        """Take `amount` units out of the total."""
        if self.total is not None:
            self.total = max(self.done, self.total - amount)

    @property
    def seconds(self) -> float:
        """The time since the start."""
        return self._clock() - self._times[0]

    @property
    def rate(self) -> float:
        """Units per second over the later half of the work done; 0 before anything is done."""
        at = max(0, bisect_left(self._counts, self.done / 2 + 1e-9) - 1)
        seconds = self._clock() - self._times[at]
        return (self.done - self._counts[at]) / seconds if seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """The time for the rest at this rate; None where that is unknown, or nothing is left."""
        rate = self.rate
        return None if not rate or not self.total or self.done >= self.total else (self.total - self.done) / rate

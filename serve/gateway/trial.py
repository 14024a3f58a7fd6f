"""The policy in force, and what the canary makes of the answers under it.

The main loop and the admin endpoint's thread both use it, so whatever changes it holds its lock.
Every change of the policy begins a trial. It ends with the next change: the operator's, or a rollback of the canary's.
"""

import asyncio
import threading
from dataclasses import dataclass, field

from vocabext.serve.gateway.canary import Canary
from vocabext.serve.gateway.metrics import Metrics
from vocabext.serve.gateway.observe import Observation
from vocabext.serve.gateway.policy import Policy
from vocabext.serve.gateway.side_tasks import SideTasks
from vocabext.serve.gateway.state import State

SAVE_AGAIN_SECONDS = 5.0


@dataclass
class Trial:
    """Changes the policy, and compares the arms under it.

    Attributes:
        state: The policy and its history.
        canary: Compares the arms; None to leave that to the operator.
        metrics: Counts the changes.
        side_tasks: Runs what saves a rollback later.
        lock: Held while the state or the canary changes.
    """

    state: State
    canary: Canary | None
    metrics: Metrics
    side_tasks: SideTasks
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        """Show the policy in the metrics."""
        self.metrics.expanded_percent.set(self.state.policy.expanded_percent)

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self.state.policy

    def set_policy(self, policy: Policy, *, by: str, reason: str = "") -> None:
        """Put a policy in force for all requests from now on; those in flight keep their arm.

        Raises:
            OSError: If it cannot be saved; the old one stays in force.
        """
        with self.lock:
            self.state.change(policy, by=by, reason=reason)
            self._begin(by)

    def roll_back(self, *, by: str, reason: str = "") -> None:
        """Send all requests to the base arm, whether or not that can be saved; if not, try again until it can."""
        with self.lock:
            was_saved = not self.state.unsaved
            self.state.roll_back(by=by, reason=reason)
            self._begin(by)
        if self.state.unsaved and was_saved:
            self.side_tasks.note(f"{self.state.unsaved}: the rollback is in force, but a restart would not know of it; "
                                 "make room, it is tried again")
            self.side_tasks.spawn(self._save_later())

    def compare(self, *answers: Observation) -> None:
        """Take answers into account that chance has divided between the arms, or that both arms gave to one request."""
        if self.canary is not None:
            with self.lock:
                for answer in answers:
                    self.canary.add(answer)
                self.judge()

    def compare_pair(self, original: Observation, mirrored: Observation) -> None:
        """Take into account how far the two answers to one greedy request agree."""
        if self.canary is not None:
            with self.lock:
                self.canary.compare(original, mirrored)

    def read(self, loss: float) -> None:
        """Take into account how much less likely the expanded model found an answer of the base."""
        if self.canary is not None:
            with self.lock:
                self.canary.read(loss)

    def judge(self) -> None:
        """Roll back if the canary has found the expanded arm worse, and it is in use."""
        with self.lock:
            if self.canary is not None and (self.policy.uses("expanded") or self.policy.mirror_percent) and (
                    reason := self.canary.reason_to_stop()):
                self.roll_back(by="canary", reason=reason)

    def _begin(self, by: str) -> None:
        self.metrics.changes.labels(by).inc()
        self.metrics.expanded_percent.set(self.policy.expanded_percent)
        if self.canary is not None:
            self.canary.restart()

    async def _save_later(self) -> None:
        while self.state.unsaved:
            await asyncio.sleep(SAVE_AGAIN_SECONDS)
            with self.lock:
                saved = self.state.unsaved and self.state.try_to_save()
            if saved:
                self.side_tasks.note(f"{self.state.path} is written again")

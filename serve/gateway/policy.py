"""Which arm answers a request: one number, two ways to pin, and a share that is mirrored.

The number is the share of requests that goes to the expanded arm; all to one arm is 0 or 100. A request
that names a user goes where all requests of that user go: users are ordered by a hash, and the first
`expanded_percent` of them get the expanded arm, so raising the share moves nobody back.
"""

import hashlib
import random
from dataclasses import asdict, dataclass, replace
from typing import Any

from vocabext.errors import UsageError
from vocabext.serve.gateway.arms import ARMS, BASE, EXPANDED


@dataclass(frozen=True)
class ArmChoice:
    """An arm, and why.

    Attributes:
        arm: The arm that answers.
        why: `pinned`, `user` or `share`.
        mirrored: Whether the other arm gets a copy of the request, whose answer nobody sees; never if it is pinned.
    """

    arm: str
    why: str
    mirrored: bool


@dataclass(frozen=True)
class Policy:
    """How requests are divided.

    Attributes:
        expanded_percent: Share of requests, or of users, that the expanded arm answers: 0 to 100.
        mirror_percent: Share of requests that are sent to the other arm as well, to be compared.
        salt: Makes the order of users this gateway's own.
    """

    expanded_percent: float = 0.0
    mirror_percent: float = 0.0
    salt: str = ""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("expanded_percent", "mirror_percent"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 100:
                raise UsageError(f"{name} is {value!r}; it must be a number from 0 to 100")

    def choose(self, *, pin: str | None, user: str | None) -> ArmChoice:
        """Choose the arm of one request.

        Args:
            pin: The arm that the request asks for, if it does.
            user: Who asks, if it is known.
        """
        if pin in ARMS:
            return ArmChoice(pin, "pinned", mirrored=False)
        mirrored = self.mirror_percent > 0 and random.random() * 100 < self.mirror_percent
        place = random.random() if user is None else self.place_of(user)
        arm = EXPANDED if place * 100 < self.expanded_percent else BASE
        return ArmChoice(arm, "share" if user is None else "user", mirrored)

    def place_of(self, user: str) -> float:
        """Return a user's place in the order, from 0 to 1."""
        digest = hashlib.blake2b(user.encode("utf-8", "surrogatepass"), digest_size=8, key=self.salt.encode()[:64])
        return int.from_bytes(digest.digest(), "big") / 2**64

    def main_arm(self) -> str:
        """Return the arm that answers most requests."""
        return EXPANDED if self.expanded_percent > 50 else BASE

    def uses(self, arm: str) -> bool:
        """Tell whether unpinned requests reach an arm."""
        return self.expanded_percent < 100 if arm == BASE else self.expanded_percent > 0

    def rolled_back(self) -> "Policy":
        """Return the policy to go back to: all to the base arm, nothing mirrored."""
        return replace(self, expanded_percent=0.0, mirror_percent=0.0)

    def describe(self) -> str:
        """Say the policy in words."""
        share = self.expanded_percent
        text = {0.0: "all requests to base", 100.0: "all requests to expanded"}.get(
            float(share), f"{share:g} % of requests to expanded")
        return text + (f", {self.mirror_percent:g} % mirrored to the other arm" if self.mirror_percent else "")

    def to_json(self) -> dict[str, Any]:
        """Return the policy as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Policy":
        """Read a policy back.

        Raises:
            UsageError: If a number is missing or out of its range.
        """
        try:
            return cls(row["expanded_percent"], row["mirror_percent"], str(row["salt"]))
        except KeyError as error:
            raise UsageError(f"a policy has no {error.args[0]!r}") from None

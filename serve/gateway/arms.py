"""The two arms: who answers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve.gateway.front import BaseFront

BASE, EXPANDED = "base", "expanded"
ARMS = (BASE, EXPANDED)


@dataclass(frozen=True)
class Arm:
    """One of the two arms.

    Attributes:
        name: `base` or `expanded`.
        url: The vLLM server behind it, without a trailing slash.
        model: What the model is called there.
        front: Puts base ids in place of text, where the engine behind it is the expanded one; None otherwise.
    """

    name: str
    url: str
    model: str
    front: "BaseFront | None" = None


def other(name: str) -> str:
    """Return the name of the other arm."""
    return EXPANDED if name == BASE else BASE

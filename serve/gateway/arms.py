"""The two arms: who answers."""

from dataclasses import dataclass

BASE, EXPANDED = "base", "expanded"
ARMS = (BASE, EXPANDED)


@dataclass(frozen=True)
class Arm:
    """One of the two arms.

    Attributes:
        name: `base` or `expanded`.
        url: The vLLM server behind it, without a trailing slash.
        model: What the model is called there.
    """

    name: str
    url: str
    model: str


def other(name: str) -> str:
    """Return the name of the other arm."""
    return EXPANDED if name == BASE else BASE

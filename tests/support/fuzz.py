"""How much of a long matrix a test walks: a part by default, all of it under `make fuzz`."""

from collections.abc import Collection, Iterable

import pytest
from hypothesis import settings


def examples(most: int) -> int:
    """Return how many examples a test draws: `most` under `--hypothesis-profile=fuzz`, else a share of it."""
    return max(3, most * settings().max_examples // 100)


def every(argument: str, names: Iterable[str], *, few: Collection[str]) -> pytest.MarkDecorator:
    """Parametrize a test with all names; those that are not among the few run under `make fuzz` only."""
    names = list(names)
    assert set(few) <= set(names), set(few) - set(names)
    return pytest.mark.parametrize(argument, [
        pytest.param(name, marks=() if name in few else pytest.mark.fuzz) for name in names])

"""A prefix tree as a regular expression that finds its way by halving.

An expression tries its alternatives one after the other. With thousands of strings most places of a text
try dozens in vain. Here a place with many branches first asks which part of them the next character is in.
"""

from collections.abc import Iterable

from vocabext.boundaries import character_class, escape

# More branches than this are divided into as many parts.
PARTS = 3


def search_tree(strings: Iterable[str]) -> str:
    """Return a regex that matches the longest of the given strings."""
    root: dict[str, dict] = {}  # type: ignore[type-arg]
    for string in strings:
        node = root
        for character in string:
            node = node.setdefault(character, {})
        node[""] = {}
    return _render(root)


def _render(node: dict[str, dict]) -> str:  # type: ignore[type-arg]
    branches = {first: _chain(first, node[first]) for first in sorted(c for c in node if c)}
    if len(branches) == 1 and "" not in node:
        return next(iter(branches.values()))
    found = _divided(list(branches.items()))
    # The string itself comes last, so that a longer one wins.
    return f"(?:{found}|)" if branches and "" in node else f"(?:{found})" if branches else ""


def _chain(literal: str, node: dict[str, dict]) -> str:  # type: ignore[type-arg]
    while len(node) == 1 and "" not in node:
        ((character, node),) = node.items()
        literal += character
    return escape(literal) + _render(node)


def _divided(branches: list[tuple[str, str]]) -> str:
    if len(branches) <= PARTS:
        return "|".join(expression for _, expression in branches)
    size = -(-len(branches) // PARTS)
    parts = [branches[at : at + size] for at in range(0, len(branches), size)]
    return "|".join(f"(?={character_class(first for first, _ in part)})(?:{_divided(part)})" for part in parts)

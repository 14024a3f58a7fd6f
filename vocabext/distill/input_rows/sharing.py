"""Which texts the tokens of a group learn from: few texts that hold many of the tokens, instead of each its own.

A snippet was cut for one token, and holds others of the group besides. The teacher's pass over it serves all of
them. So each token gets as many snippets as it has, taken from the snippets of the whole group, chosen such that
few texts are needed: greedily, the text that serves most tokens comes first (the greedy cover of Johnson 1974).

The order matters. Rounds begin with few snippets of each token, so the few are covered first, then twice as many,
and so on. Only the choice of the texts depends on the rest of the group; every row is fitted on its own as before.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import replace

from vocabext.tokens import TokenSnippets

# Expanded ids that must stand before and from the token on, for a snippet of another token to do. Own snippets do
# in any case.
BEFORE, FROM = 4, 5

Snippet = tuple[int, ...]


def share_texts(records: Sequence[TokenSnippets], ids: Sequence[int], first: int) -> list[TokenSnippets]:
    """Choose snippets for the tokens of a group out of the snippets of all of them.

    Args:
        records: The group; snippets are in expanded ids.
        ids: The id of each token of the group.
        first: How many snippets of each token are needed first; those come first in the result.

    Returns:
        The records, each with as many snippets as before. `num_generated` stays as it was.
    """
    places = _places(records, ids)
    chosen: list[list[tuple[Snippet, int]]] = [[] for _ in records]
    most = max((len(record.snippets) for record in records), default=0)
    wanted = min(first, most)
    while True:
        need = [min(wanted, len(record.snippets)) - len(found)
                for record, found in zip(records, chosen, strict=True)]
        _cover(places, need, chosen)
        if wanted >= most:
            break
        wanted = min(2 * wanted, most)
    for record, found in zip(records, chosen, strict=True):  # a snippet that a token has twice was counted once
        own = list(zip(record.snippets, record.positions, strict=True))
        found += own[: len(own) - len(found)]
    return [replace(record, snippets=tuple(snippet for snippet, _ in found), positions=tuple(at for _, at in found))
            for record, found in zip(records, chosen, strict=True)]


def _places(records: Sequence[TokenSnippets], ids: Sequence[int]) -> dict[Snippet, dict[int, int]]:
    """Return every text, with the tokens that can learn from it and where they stand."""
    numbers = {own: number for number, own in enumerate(ids)}
    places: dict[Snippet, dict[int, int]] = {}
    for number, record in enumerate(records):
        for snippet, position in zip(record.snippets, record.positions, strict=True):
            if snippet not in places:
                places[snippet] = _others(snippet, numbers)
            places[snippet][number] = position
    return places


def _others(snippet: Snippet, numbers: Mapping[int, int]) -> dict[int, int]:
    found: dict[int, int] = {}
    for position, token in enumerate(snippet):
        number = numbers.get(token)
        if number is not None and number not in found:
            found[number] = position
    return {number: position for number, position in found.items() if BEFORE <= position <= len(snippet) - FROM}


def _cover(places: Mapping[Snippet, dict[int, int]], need: list[int], chosen: Sequence[list[tuple[Snippet, int]]]
           ) -> None:
    """Take texts until no token needs one; what a token takes goes from `places` to `chosen`."""
    texts = list(places)
    holding: list[list[int]] = [[] for _ in need]  # the texts that a token may take
    gains = []  # how many tokens a text would serve
    for at, text in enumerate(texts):
        wanting = [number for number in places[text] if need[number] > 0]
        gains.append(len(wanting))
        for number in wanting:
            holding[number].append(at)
    queue = [(-gain, at) for at, gain in enumerate(gains) if gain]
    heapq.heapify(queue)
    while queue:
        said, at = heapq.heappop(queue)
        if gains[at] < -said:  # others have served some of its tokens since
            if gains[at]:
                heapq.heappush(queue, (-gains[at], at))
            continue
        here, gains[at] = places[texts[at]], 0
        for number in [number for number in here if need[number] > 0]:
            chosen[number].append((texts[at], here.pop(number)))
            need[number] -= 1
            if not need[number]:
                for other in holding[number]:
                    gains[other] -= number in places[texts[other]]

"""Which snippets are one text: equal, one inside the other, or windows of a document that overlap.

Whatever is trained on must not judge. A short document that holds a token twice gives one text under two positions, a
longer one gives windows that overlap, and a document that a corpus holds twice gives windows of the same text that
begin at different places. All of these are found here, in base ids: how a text is merged does not matter.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from vocabext.tokens import Ids

# Base ids by which the beginning of a text is found in others; a shorter text is one with its equals only.
HEAD = 8
# Share of the shorter text that two must have in common.
COMMON = 0.5


def text_numbers(texts: Sequence[Ids]) -> list[int]:
    """Return for each snippet which text it is, numbered in the order of their first snippets.

    Two snippets are one text if one begins inside the other (or with it), goes on as it does until one of them
    ends, and has at least `COMMON` of the shorter in common with it; and so are two that are one with a third.

    Args:
        texts: Snippets in base ids.
    """
    raw = [np.asarray(text, np.int64).tobytes() for text in texts]
    item = np.dtype(np.int64).itemsize
    beginning: dict[bytes, list[int]] = defaultdict(list)
    for number, text in enumerate(raw):
        beginning[text[: HEAD * item]].append(number)
    parent = list(range(len(raw)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = number = parent[parent[number]]
        return number

    for number, text in enumerate(raw):
        for start in range(0, max(1, len(text) - HEAD * item + item), item):
            for other in beginning.get(text[start : start + HEAD * item], ()):
                common = min(len(text) - start, len(raw[other]))
                if (common >= COMMON * min(len(text), len(raw[other]))
                        and text[start : start + common] == raw[other][:common]):
                    one, two = sorted((root(number), root(other)))
                    parent[two] = one
    order = {first: at for at, first in enumerate(sorted({root(number) for number in range(len(raw))}))}
    return [order[root(number)] for number in range(len(raw))]

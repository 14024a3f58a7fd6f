"""A Unigram model in whole numbers, and the question what can happen at the left edge of a new token.

Unigram takes the segmentation with the highest total score. Going from left to right it keeps, for each
place in the text, the best total up to there and the entry that ends there; of equal totals the *longest
last entry* wins. A new token whose score is exactly the sum over its run is a shortcut: no best total
changes, at no place, and the token is taken where its run lies on a best path and no longer entry ends at
the same place. So on the right of a token nothing can go wrong. Inside it the base must make the choices
that it makes on the token's string alone. It does, unless an entry that *crosses the left edge* of the
string leads to an equal total and to a longer last entry at one of the cuts of the run.

For a crossing entry `c = u + v` (`u` before the edge, `v` the beginning of the string) such a tie fixes
what the text before the edge contributes: D = best(before) - best(before without u) = X, a number known
in advance. D is never below `floor(u)`, the best total of `u` alone, and never above `ceiling(u)`, the most
that entries reaching back over the start of `u` can add. `left_tie` finds the entries for which X lies between the two.
"""

import bisect
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property


class Lattice:
    """Entries with whole-number scores."""

    def __init__(self, scores: Mapping[str, int], unknown: int) -> None:
        """Take over a model.

        Args:
            scores: Entry to score.
            unknown: The score of a character that is no entry by itself.
        """
        self.scores = scores
        self.unknown = unknown
        self.longest = max(map(len, scores), default=1)
        self.floor = cache(self.floor)  # type: ignore[method-assign]
        self.ceiling = cache(self.ceiling)  # type: ignore[method-assign]
        self._reach = cache(self._reach)  # type: ignore[method-assign]

    def totals(self, text: str) -> list[int]:
        """Return the best total of every beginning of a text, the empty one first."""
        scores, best = self.scores, [0]
        for end in range(1, len(text) + 1):
            options = [best[end - 1] + scores.get(text[end - 1], self.unknown)]
            for start in range(max(0, end - self.longest), end - 1):
                score = scores.get(text[start:end])
                if score is not None:
                    options.append(best[start] + score)
            best.append(max(options))
        return best

    def floor(self, text: str) -> int:
        """Return the best total of a text that stands alone."""
        return self.totals(text)[-1]

    def ceiling(self, text: str) -> int:
        """Return a bound on what a text can add to the best total of what stands before it."""
        over = (self._reach(text[:n]) + self.floor(text[n:]) for n in range(1, len(text) + 1))
        return max(self.floor(text), *(total for total in over if total is not None))

    def left_tie(self, text: str, cuts: Sequence[int]) -> str | None:
        """Return an entry that, crossing the left edge of a text, could change how the text is cut.

        Args:
            text: The string of a new token.
            cuts: Where each piece of its run ends.
        """
        totals = self.totals(text)
        for inside in range(1, len(text) + 1):
            crossing = self._longer_with_ending(text[:inside])
            changes = set(self._changes(text, inside, cuts, totals)) if crossing else ()
            for entry in crossing if changes else ():
                before = entry[:-inside]
                if any(self.floor(before) <= self.scores[entry] + change <= self.ceiling(before) for change in changes):
                    return entry
        return None

    def _changes(self, text: str, inside: int, cuts: Sequence[int], totals: Sequence[int]) -> Iterator[int]:
        """Yield, for each cut where a longer entry can win a tie, its total from `inside` less that of the run."""
        inner = self.totals(text[inside:])
        for piece, cut in enumerate(cuts):
            length = cut - (cuts[piece - 1] if piece else 0)
            if cut == inside:
                yield -totals[cut]
            elif any(inner[start - inside] + self.scores.get(text[start:cut], -(10**30)) == inner[cut - inside]
                     for start in range(inside, cut - length)):
                yield inner[cut - inside] - totals[cut]

    def _reach(self, text: str) -> int:
        """Return the most that an entry longer than a text, which ends in it, adds to what stands before the text."""
        gains = [self.scores[entry] - self.floor(entry[: -len(text)]) for entry in self._longer_with_ending(text)]
        return max(gains, default=-(10**30))

    @cached_property
    def _reversed(self) -> list[str]:
        return sorted(entry[::-1] for entry in self.scores)

    def _longer_with_ending(self, text: str) -> list[str]:
        wanted, found = text[::-1], []
        at = bisect.bisect_left(self._reversed, wanted)
        while at < len(self._reversed) and self._reversed[at].startswith(wanted):
            if len(self._reversed[at]) > len(text):
                found.append(self._reversed[at][::-1])
            at += 1
        return found

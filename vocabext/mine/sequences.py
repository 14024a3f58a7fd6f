"""Choose whole sequences of units, for tokenizers that look a chunk up as it is.

A new token may begin and end only where a unit does. Candidates are all sequences of up to `max_units` units that are
frequent. They are chosen greedily by what they save *given what is chosen already*: once `" signs and symptoms"`
is a token, `" symptoms"` saves only where it stands alone. Since choices only ever lower what others save, a stale
value is an upper bound and most of them need never be computed again (lazy greedy, Minoux 1978).
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from vocabext.errors import TokenizerError
from vocabext.mine.counts import Array, Choice, Corpus, apart, as_token, outside_best, text_of
from vocabext.options import MineConfig
from vocabext.tokenizer import BaseTokenizer
from vocabext.tokens import NewToken


@dataclass
class Candidates:
    """The frequent sequences of units and where they occur; arrays of shape (C,) unless noted."""

    units: Array  # units per sequence
    worth: Array  # the tokens it would save if nothing else were chosen, overlaps not yet taken out
    positions: Array  # all places, candidate by candidate (P,)
    edges: Array  # where each candidate's places begin in `positions` (C + 1,)

    def __len__(self) -> int:
        return len(self.units)

    def places(self, index: int) -> Array:
        """Return the units at which a candidate begins, in reading order."""
        return self.positions[self.edges[index] : self.edges[index + 1]]


def frequent_sequences(corpus: Corpus, config: MineConfig, merged: npt.NDArray[np.bool_]) -> Candidates:
    """Find all sequences of units that are frequent enough and at least two tokens long.

    Args:
        corpus: The corpus.
        config: The thresholds.
        merged: Units of which no sequence is wanted that holds nothing else, shape (U,).
    """
    merged_before: Array = np.append(0, np.cumsum(merged, dtype=np.int64))
    none = np.empty(0, np.int64)
    found: list[tuple[Array, Array, Array, Array]] = [(none, none, none, none)]
    codes = corpus.codes.copy()
    alive = corpus.inside.copy()
    pieces = corpus.pieces.copy()
    for units in range(1, 2 if config.words_only else config.max_units + 1):
        if units > 1:
            alive, codes, pieces = _longer(corpus, alive, codes, pieces, units)
        at = np.flatnonzero(alive)
        if not len(at):
            break
        _, group, counts = np.unique(codes[at], return_inverse=True, return_counts=True)
        frequent = counts[group] >= config.min_count
        alive[at[~frequent]] = False  # a longer sequence cannot be more frequent than its beginning
        at, group = at[frequent], group[frequent]
        usable = (pieces[at] > 1) & (corpus.closable[at + units - 1] | (units == 1))
        usable &= merged_before[at + units] - merged_before[at] < units
        found.append(_grouped(at[usable], group[usable], pieces, units, config.min_count))
    lengths, worth, positions, sizes = (np.concatenate(column) for column in zip(*found, strict=True))
    return Candidates(lengths, worth, positions, np.concatenate((np.zeros(1, np.int64), np.cumsum(sizes))))


def _grouped(at: Array, group: Array, pieces: Array, units: int,
             min_count: int) -> tuple[Array, Array, Array, Array]:
    """Sort places by the sequence that stands there; returns units, worth, all places, and how many each has."""
    counts = np.bincount(group)
    enough = counts[group] >= min_count
    at, group = at[enough], group[enough]
    at = at[np.argsort(group, kind="stable")]
    sizes = counts[counts >= min_count]
    first = at[np.cumsum(sizes) - sizes]
    return np.full(len(sizes), units), sizes * (pieces[first] - 1), at, sizes


def _longer(corpus: Corpus, alive: npt.NDArray[np.bool_], codes: npt.NDArray[np.uint64], pieces: Array,
            units: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint64], Array]:
    """Extend every sequence that is still alive by the unit that follows it."""
    wider = np.zeros_like(alive)
    follows = slice(units - 1, None)
    width = len(alive) - units + 1
    wider[:width] = alive[:width] & corpus.inside[follows]
    longer = codes.copy()
    longer[:width] = codes[:width] * np.uint64(0xD6E8FEB86659FD93) + corpus.codes[follows]
    total = pieces.copy()
    total[:width] += corpus.pieces[follows]
    return wider, longer, total


def choose_sequences(corpus: Corpus, candidates: Candidates, base: BaseTokenizer, config: MineConfig) -> Choice:
    """Take the candidate that saves most elsewhere, again and again, recomputing only what may have changed.

    Args:
        corpus: The corpus.
        candidates: Its frequent sequences.
        base: The tokenizer to extend.
        config: The thresholds.
    """
    rejected: dict[str, str] = {}
    return Choice(_choose(corpus, candidates, base, config, rejected), rejected, lambda: len(candidates))


def _choose(corpus: Corpus, candidates: Candidates, base: BaseTokenizer, config: MineConfig,
            rejected: dict[str, str]) -> Iterator[tuple[int, NewToken]]:
    cover = _Cover(corpus, candidates)
    taken: set[tuple[int, ...]] = set()
    heap = [(-worth, index, -1) for index, worth in enumerate(candidates.worth.tolist())]
    heapq.heapify(heap)
    while heap:
        worth, index, computed_at = heapq.heappop(heap)
        if computed_at < len(taken):
            elsewhere, count = cover.savings(index)
            if count >= config.min_count and elsewhere > 0:
                heapq.heappush(heap, (-elsewhere, index, len(taken)))
            continue
        # Only a winner is made a token: that takes longer than all the rest.
        run = corpus.run(int(candidates.places(index)[0]), int(candidates.units[index]))
        if run in taken:
            continue
        try:
            token = as_token(run, base, config)
        except TokenizerError as error:
            rejected[text_of(run, base)] = str(error)
            continue
        taken.add(run)
        yield -worth, replace(token, saved=cover.take(index))


class _Cover:
    """Which units are covered by chosen tokens, and what a candidate would still save."""

    def __init__(self, corpus: Corpus, candidates: Candidates) -> None:
        self.candidates = candidates
        self.sections = corpus.sections
        self.cost = corpus.pieces.copy()  # tokens counted at each unit's first place
        self.begins = np.ones(len(corpus.pieces) + 1, np.bool_)  # a token or free unit begins here
        self.left: dict[int, Array] = {}  # where a candidate still fits, once some of its places are gone

    def savings(self, index: int) -> tuple[int, int]:
        """Return the tokens that a candidate would save now outside its best section, and at how many places in all."""
        at, cost = self._free(index)
        if not len(at):
            return 0, 0
        return outside_best(self.sections[at], cost - 1), len(at)

    def take(self, index: int) -> int:
        """Cover a candidate's places; returns the tokens saved."""
        at, cost = self._free(index)
        for offset in range(int(self.candidates.units[index])):
            self.cost[at + offset] = 1 if offset == 0 else 0
            self.begins[at + offset] = offset == 0
        return int(cost.sum()) - len(at)

    def _free(self, index: int) -> tuple[Array, Array]:
        """Return the places where a candidate still saves something, and what the text costs there now."""
        units = int(self.candidates.units[index])
        at = self.left[index] if index in self.left else self.candidates.places(index)
        fits = self.begins[at] & self.begins[at + units]
        if not fits.all():
            # Places that an earlier token cuts into are gone for good, and never looked at again.
            at = self.left[index] = at[fits]
        cost = self.cost[at]
        for offset in range(1, units):
            cost = cost + self.cost[at + offset]
        saves = cost > 1
        if not saves.all():
            at, cost = at[saves], cost[saves]
        if units > 1:
            alone = apart(at, at + units)
            at, cost = at[alone], cost[alone]
        return at, cost

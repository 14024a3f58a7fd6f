"""Choose pairs, again and again, for tokenizers whose new tokens are merges.

This is how a BPE vocabulary is trained (Sennrich et al., arXiv 1508.07909), continued on the tokens of the base: the
pair of neighbours that saves most becomes a token, and is one symbol from then on. So every token is merged from
tokens that were chosen before it, or from those of the base. Two things differ from plain training:

- A pair counts only where it lies inside one unit (a word), or is made of whole units (a phrase). Half a word with
  half of the next, such as `ation of`, is rarely worth a row. In byte-level BPE a unit here is a character, and half
  of one is no text.
- What a pair saves in the section that uses it most does not count, as in `sequences.py`.

A pair that is chosen is merged wherever it stands, as the tokenizer will.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from vocabext.errors import TokenizerError
from vocabext.mine.counts import Array, Choice, Corpus, Flags, apart, as_token, outside_best, text_of
from vocabext.options import MineConfig
from vocabext.tokenizer import BaseTokenizer, MergeChain
from vocabext.tokens import NewToken

GONE = -2  # stands where a symbol has become part of the one before it


def choose_merges(corpus: Corpus, base: BaseTokenizer, chain: MergeChain, config: MineConfig) -> Choice:
    """Choose tokens in the order of their merges.

    Args:
        corpus: The corpus.
        base: The tokenizer to extend.
        chain: An empty chain of its merges; gets those of the tokens.
        config: The thresholds.
    """
    line = _Line(corpus, base, config)
    rejected: dict[str, str] = {}
    return Choice(_choose(line, base, chain, config, rejected), rejected, lambda: line.num_pairs)


def _choose(line: "_Line", base: BaseTokenizer, chain: MergeChain, config: MineConfig,
            rejected: dict[str, str]) -> Iterator[tuple[int, NewToken]]:
    taken: set[tuple[int, ...]] = set()
    while (best := line.best()) is not None:
        run = line.run(best)
        if run in taken:
            continue
        try:
            token = as_token(run, base, config)
            if not chain.accepts(token):
                continue
            _add(token, line.left(best), base, chain)
        except TokenizerError as error:
            rejected[text_of(run, base)] = str(error)
            continue
        taken.add(run)
        yield best.worth, replace(token, saved=line.merge(best))


def _add(token: NewToken, left: tuple[int, ...], base: BaseTokenizer, chain: MergeChain) -> None:
    """Add a token to the chain, or make sure that it can be searched for instead, and that this is cheap.

    Raises:
        TokenizerError: If it is not.
    """
    symbols = chain.cut(token)
    other = len(symbols) == 2 and base.scheme.spelling(left) != symbols[0].encode()
    if not other and chain.add(token):
        return
    at = next((i for i, c in enumerate(token.token) if base.scheme.is_never_merged(c)), None)
    if other or at is None:
        raise TokenizerError(f"{token.token!r} is merged from other tokens on its own")
    if base.scheme.only_merges and any(c.isalnum() for c in token.token[:at]):
        raise TokenizerError(f"{token.token!r} has a letter in front of a character that is a byte, "
                             "so that every word would have to be looked at")


@dataclass
class _Pair:
    """Two neighbouring symbols, or one character that no merge of two makes.

    Attributes:
        left: The first symbol, or the character.
        right: The second symbol; None for a character.
        at: Where it stands, in reading order.
        worth: The tokens it saved outside its best section when it was last looked at.
    """

    left: int
    right: int | None
    at: Array
    worth: int = 0


class _Line:
    """The corpus as a line of symbols: base ids, and what was merged from them.

    A symbol is known by the place of its first base id. Arrays of shape (T + 1,) have an entry for each base id
    and one for the end.
    """

    def __init__(self, corpus: Corpus, base: BaseTokenizer, config: MineConfig) -> None:
        length, self.config = len(corpus.ids), config
        self.ids = corpus.ids
        self.symbol = np.append(corpus.ids, -1)
        self.next, self.previous = np.arange(1, length + 2), np.arange(-1, length)
        self.end = np.arange(1, length + 2)
        begins = np.zeros(length + 1, np.bool_)
        begins[corpus.starts] = begins[-1] = True
        self.begins, self.unit = begins, np.cumsum(begins)
        self.section = np.append(np.repeat(corpus.sections, corpus.pieces), -1)
        self.first_new_id, self.num_pairs = base.first_new_id, 0
        characters = self._spell(corpus, base)
        self.num_symbols = self.first_new_id + len(characters)
        # Doubled when it is full; the last entry, index -1, is the barrier between documents.
        self.allowed = np.zeros(self.num_symbols + 1, np.bool_)
        self.allowed[: self.first_new_id] = base.scheme.mergeable_ids
        self.only_whole = not base.scheme.only_merges
        self._pairs: dict[int, _Pair] = {}
        self._heap: list[tuple[int, int]] = []
        for left, at in characters:
            self._offer(_Pair(left, None, at), len(at) * int(self.end[at[0]] - at[0] - 1))
        self._find(np.flatnonzero(self.symbol[:-1] != GONE))

    def _spell(self, corpus: Corpus, base: BaseTokenizer) -> list[tuple[int, Array]]:
        """Make one symbol of what no merge of two makes, mostly a character; returns the symbols and their places."""
        spelled = np.append(base.scheme.spelling_ids, False)  # -1, between documents
        whole = np.logical_and.reduceat(spelled[corpus.ids], corpus.starts)
        whole &= corpus.pieces > (1 if base.scheme.only_merges else 2)
        at, pieces = corpus.starts[whole], corpus.pieces[whole]
        for k in range(1, int(pieces.max(initial=0))):
            self.symbol[at[pieces > k] + k] = GONE
        self.next[at] = self.end[at] = at + pieces
        self.previous[at + pieces] = at
        _, number = np.unique(corpus.codes[whole], return_inverse=True)
        self.symbol[at] = self.first_new_id + number
        return [(int(self.symbol[places[0]]), places) for places in _groups(at, number)]

    # -- the best pair --------------------------------------------------------------------------------------------

    def best(self) -> _Pair | None:
        """Take out the pair that saves most outside its best section; None if no frequent one saves anything.

        Merging only ever takes places away from a pair that is known, so what it was worth before is a bound.
        """
        while self._heap:
            _, key = heapq.heappop(self._heap)
            pair = self._pairs[key]
            self._drop_gone(pair)
            count, pair.worth = self._counts(pair)
            if count < self.config.min_count or pair.worth <= 0:
                del self._pairs[key]
            elif self._heap and pair.worth < -self._heap[0][0]:
                heapq.heappush(self._heap, (-pair.worth, key))
            else:
                return self._pairs.pop(key)
        return None

    def run(self, pair: _Pair) -> tuple[int, ...]:
        """Return the base ids of a pair."""
        start = int(pair.at[0])
        stop = self.end[start] if pair.right is None else self.end[self.next[start]]
        return tuple(self.ids[start:stop].tolist())

    def left(self, pair: _Pair) -> tuple[int, ...]:
        """Return the base ids of its first symbol."""
        start = int(pair.at[0])
        return tuple(self.ids[start : self.end[start]].tolist())

    def _drop_gone(self, pair: _Pair) -> None:
        """Forget the places where a pair does not stand any more."""
        pair.at = pair.at[self.symbol[pair.at] == pair.left]
        if pair.right is not None:
            pair.at = pair.at[self.symbol[self.next[pair.at]] == pair.right]

    def _apart(self, pair: _Pair) -> Array:
        """Return the places where a pair would be merged: from left to right, no symbol twice."""
        return pair.at[apart(pair.at, self.end[self.next[pair.at]])] if pair.left == pair.right else pair.at

    def _counts(self, pair: _Pair) -> tuple[int, int]:
        """Return at how many good places a pair stands, and the tokens it would save outside its best section."""
        at = self._apart(pair)
        at = at[self._good(at, pair.right is None)]
        if not len(at):
            return 0, 0
        return len(at), outside_best(self.section[at], np.full(len(at), self._saves(pair)))

    def _saves(self, pair: _Pair) -> int:
        return 1 if pair.right is not None else int(self.end[pair.at[0]] - pair.at[0]) - 1

    def _good(self, at: Array, single: bool) -> Flags:
        """Tell where a pair lies inside one unit, or consists of whole ones."""
        if single:
            return np.ones(len(at), np.bool_)
        middle = self.next[at]
        end = self.end[middle]
        units = self.unit[end - 1] - self.unit[at] + 1
        begins_and_ends = self.begins[at] & self.begins[end]
        inside = (units == 1) & (begins_and_ends if self.only_whole else True)
        if self.config.words_only:
            return np.asarray(inside)
        return np.asarray(inside | (begins_and_ends & self.begins[middle] & (units <= self.config.max_units)))

    # -- merging --------------------------------------------------------------------------------------------------

    def merge(self, pair: _Pair) -> int:
        """Make one symbol of a pair wherever it stands; returns the tokens saved."""
        at, symbol = self._apart(pair), pair.left
        if pair.right is not None:
            symbol, self.num_symbols = self.num_symbols, self.num_symbols + 1
            middle = self.next[at]
            self.symbol[at], self.symbol[middle] = symbol, GONE
            self.next[at], self.end[at] = self.next[middle], self.end[middle]
            self.previous[self.next[at]] = at
        if symbol >= len(self.allowed) - 1:
            self.allowed = np.append(self.allowed, np.zeros_like(self.allowed))
        self.allowed[symbol] = True
        before = self.previous[at]
        self._find(np.union1d(before[before >= 0], at))
        return len(at) * self._saves(pair)

    def _find(self, at: Array) -> None:
        """Offer all frequent pairs that begin at some places and have a symbol that is new."""
        left, right = self.symbol[at], self.symbol[self.next[at]]
        usable = self.allowed[left] & self.allowed[right]
        at, left, right = at[usable], left[usable], right[usable]
        for places in _groups(at, left * len(self.allowed) + right):
            if len(places) >= self.config.min_count:
                pair = _Pair(int(self.symbol[places[0]]), int(self.symbol[self.next[places[0]]]), places)
                self._offer(pair, int(self._good(places, False).sum()))

    def _offer(self, pair: _Pair, at_most: int) -> None:
        """Note a pair that saves at most so many tokens."""
        if at_most >= self.config.min_count:
            heapq.heappush(self._heap, (-at_most, self.num_pairs))
            self._pairs[self.num_pairs] = pair
            self.num_pairs += 1


def _groups(at: Array, key: Array) -> list[Array]:
    """Divide places by their key; each part stays in order."""
    order = np.argsort(key, kind="stable")
    edges = np.flatnonzero(np.diff(key[order])) + 1
    return np.split(at[order], edges) if len(at) else []

"""New tokens that BPE makes by itself: merges behind all others.

A merge at the end of the list ranks behind every merge of the base. BPE applies the lowest rank first, and what
a new merge makes takes part in new merges only. So on any text BPE does all base merges before the first new
one, and undoing the new ones gives the ids of the base, in every context. No step searches the text or cuts it.
A character that the base spells in bytes needs no merge, only an entry of its own.

A merge joins two entries, so a token of three pieces needs a *part*: another new token of two of them. A splitting
step must search for tokens without parts (`vocabext.tokenizer.boundaries`).
"""

from collections.abc import Callable, Container, Sequence
from itertools import pairwise

from vocabext.tokens import NewToken


class MergeChain:
    """Merges for new tokens, each of two entries: of the base, or of new tokens before it.

    Attributes:
        accepts: Tells which tokens should be merges at all.
        pairs: Key of a new token to the two entries that it is merged from, in the order of their ranks.
        characters: Keys of new tokens that are one character, which the base spells in bytes.
    """

    def __init__(
        self, vocabulary: Container[str], symbols: Callable[[Sequence[int]], list[str]],
        accepts: Callable[[NewToken], bool] = lambda _: True,
    ) -> None:
        """Begin with no merge.

        Args:
            vocabulary: The entries of the base.
            symbols: Turns ids into their entries, and bytes into the characters that they spell.
            accepts: Tells which tokens should be merges at all.
        """
        self._vocabulary = vocabulary
        self._symbols = symbols
        self.accepts = accepts
        self._ranks: dict[tuple[str, str], int] = {}
        self.pairs: dict[str, tuple[str, str]] = {}
        self.characters: set[str] = set()

    def cut(self, token: NewToken) -> list[str]:
        """Return the entries that the merges so far make of a token."""
        symbols = self._symbols(token.run)
        while known := [pair for pair in pairwise(symbols) if pair in self._ranks]:
            at = list(pairwise(symbols)).index(min(known, key=self._ranks.__getitem__))
            symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
        return symbols

    def add(self, token: NewToken) -> bool:
        """Add the merge that makes a token; returns False if it should be no merge, or its parts are no entries."""
        if not self.accepts(token):
            return False
        if len(token.key) == 1:
            self.characters.add(token.key)
            return True
        symbols = self.cut(token)
        if len(symbols) != 2 or not all(map(self._is_entry, symbols)):
            return False
        self.pairs[token.key] = pair = symbols[0], symbols[1]
        self._ranks[pair] = len(self._ranks)
        return True

    def add_all(self, tokens: Sequence[NewToken]) -> list[NewToken]:
        """Add the merges of as many tokens as possible, in their order; returns the other tokens."""
        waiting = sorted(tokens, key=lambda token: len(token.key) > 1)
        while len(still := [token for token in waiting if not self.add(token)]) < len(waiting):
            waiting = still
        return waiting

    def _is_entry(self, symbol: str) -> bool:
        return symbol in self._vocabulary or symbol in self.pairs or symbol in self.characters
